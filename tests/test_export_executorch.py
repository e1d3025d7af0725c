"""Programs in ExecuTorch's own runtime give what the model gives. Needs the extra `executorch`, which CI does not install."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemma_opt import loading
from gemma_opt.errors import UsageError
from gemma_opt.export import ExportFormat, export
from gemma_opt.recipe import Recipe

INSTALLED = find_spec("executorch") is not None and find_spec("executorch.exir") is not None
needs_executorch = pytest.mark.skipif(not INSTALLED, reason="executorch is not installed")
MOBILE = "quantization.default={format: int8_dynamic_int4, symmetric: true}"
TOKENS = torch.randint(3, 2000, (1, 150), generator=torch.Generator().manual_seed(1))  # past the window of 128
CHUNKS = (40, 70, 35, 1, 1, 1, 1, 1)


def source(name: str, *overrides: str) -> loading.Source:
    return loading.Source(Recipe.load(name, ("engine.context=192", *overrides)))


def run(program: Path) -> Tensor:
    """Logits of TOKENS, read in chunks through the program's own cache: [1, 150, vocabulary]."""
    import executorch.kernels.quantized  # noqa: F401 registers the lookup of int8 rows # pyright: ignore[reportMissingImports]
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    forward: Any = Runtime.get().load_program(program).load_method("forward")
    found: list[Tensor] = []
    at = 0
    for size in CHUNKS:
        found.append(forward.execute([TOKENS[:, at : at + size].contiguous(), torch.arange(at, at + size)])[0].clone())
        at += size
    return torch.cat(found, dim=1)


@needs_executorch
@pytest.mark.filterwarnings("ignore")  # torch's and executorch's own, by the dozen
@pytest.mark.parametrize(
    ("chosen", "most", "bytes_"),
    [(source("small-bf16"), 1e-4, None), (source("small-int8", MOBILE), 0.02, 3_100_000)],
    ids=["floats", "mobile"],
)
def test_a_program_gives_what_the_model_gives(chosen: loading.Source, most: float, bytes_: int | None, tmp_path: Path) -> None:
    made = export(chosen, tmp_path / "out", ExportFormat.EXECUTORCH)
    with torch.inference_mode():
        wanted = loading.open_model(chosen, "cpu").model(TOKENS).logits
    found = run(tmp_path / "out" / "model.pte")
    assert float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()) < most
    assert bytes_ is None or made.bytes < bytes_
    assert "model.pte" in (tmp_path / "out" / "README.md").read_text()


@needs_executorch
def test_zero_points_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="symmetric: true"):
        export(source("small-int8", "quantization.default=int8_dynamic_int4"), tmp_path / "out", ExportFormat.EXECUTORCH)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(INSTALLED, reason="executorch is installed")
def test_a_missing_library_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="executorch is not installed"):
        export(source("small-int8"), tmp_path / "out", ExportFormat.EXECUTORCH)
