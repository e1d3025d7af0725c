"""What .dockerignore lets into the Cog image."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

import pytest

from gemma_opt.staging import OLD, PARTIAL

ROOT = Path(__file__).resolve().parents[1]


def ignored(path: str) -> bool:
    """Docker's rule for patterns without exceptions: the path or a folder above it matches."""
    lines = (line.strip() for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines())
    patterns = [re.compile(_regex(line)) for line in lines if line and not line.startswith("#")]
    places = [path, *(str(parent) for parent in PurePosixPath(path).parents)]
    return any(pattern.fullmatch(place) for pattern in patterns for place in places)


def _regex(pattern: str) -> str:
    assert not pattern.startswith("!")
    parts = re.split(r"(\*\*/|\*)", pattern)
    return "".join({"**/": "(.*/)?", "*": "[^/]*"}.get(part, re.escape(part)) for part in parts)


@pytest.mark.parametrize("folder", ["gemma_opt", "weights_cache/small-gemma3"])
def test_what_serving_reads_is_in_the_image(folder: str) -> None:
    """Python, kernels' sources, recipes, the bundled weights: every file but caches."""
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()]
    lost = [path for path in files if ignored(path) and "__pycache__" not in path]
    assert len(files) > 5
    assert lost == []


@pytest.mark.parametrize(
    "path",
    [
        "predict.py", "cog.yaml", "openapi.json", "requirements.txt", "README.md", "LICENSE",
        "weights_cache/gemma-3-4b-int8/manifest.json", "weights_cache/gemma-3-4b-int8/model-00001-of-00002.safetensors",
        "weights_cache/gemma-3-4b-int8/compile_cache/triton/KEY/kernel.cubin", ".cog/tmp/build1/requirements.txt",
    ],
)  # fmt: skip
def test_finished_checkpoints_and_cogs_own_files_are_in_the_image(path: str) -> None:
    assert not ignored(path)


@pytest.mark.parametrize(
    "path",
    [
        ".git/objects/ab/cdef", ".venv/lib/python3.11/site-packages/torch/lib/libtorch.so", "build/gpu_compile_cache/x",
        "gemma_opt/engine/__pycache__/core.cpython-311.pyc", "tests/test_image.py", "benchmarks/results/quality_270m.png",
        f"weights_cache/.gemma-3-4b-int8.0123abcd{PARTIAL}/model-00001-of-00002.safetensors",
        f"weights_cache/.gemma-3-4b-int8.0123abcd{OLD}/manifest.json", "weights_cache/.gemma-3-4b-int8.work/origin.json",
    ],
)  # fmt: skip
def test_this_machines_junk_is_not(path: str) -> None:
    """Without the file a `cog push` sent the virtual environment, the history and half-written checkpoints: gigabytes."""
    assert ignored(path)
