"""What distillation wins back on the bundled model: `python -m benchmarks.distill_small`.

Half of the weights of every text linear fall, as whole output rows (the method that hurts this model most); then the model
learns from the uncompressed one on pictures of the training stream. Measured: 500 one-word questions about unseen pictures,
asked through the service, before and after. Writes benchmarks/results/distill_small.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.environment import RESULTS, describe
from gemma_opt.build import build
from gemma_opt.evaluation.perplexity import answer_perplexity
from gemma_opt.evaluation.quiz import run_quiz
from gemma_opt.loading import Source
from gemma_opt.recipe import Recipe
from gemma_opt.service import Service

SEED = 20
PICTURES = 60
PRUNED = "sparsity=[{method: rows, ratio: 0.5}]"
DISTILL = (
    "distill={{data: [charts], windows: 2048, window_tokens: 256, steps: {steps}, batch: 16, micro_batch: 16, "
    "learning_rate: 0.001, temperature: 2.0, top_k: 64, precision: bfloat16}}"
)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 400,
    questions: Annotated[int, typer.Option(min=9)] = 500,
    out: Annotated[Path, typer.Option(help="Result file.")] = RESULTS / "distill_small.json",
) -> None:
    """Measure the dense, the pruned and the recovered model."""
    distill = DISTILL.format(steps=steps)
    variants = {"dense": (), "rows-50": (PRUNED,), "rows-50-distilled": (PRUNED, distill)}
    rows = {name: measure(name, overrides, questions) for name, overrides in variants.items()}
    dense, pruned, recovered = (float(str(rows[name]["accuracy"])) for name in variants)
    result = {
        "what": "one-word questions about unseen pictures, greedy, one at a time, through the service",
        "questions": questions,
        "seed": SEED,
        "perplexity_pictures": PICTURES,
        "environment": describe(),
        "distill": distill,
        "won_back": (recovered - pruned) / (dense - pruned),
        "rows": rows,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    typer.echo(f"{result['won_back']:.1%} of the lost accuracy won back", err=True)


def measure(name: str, overrides: tuple[str, ...], questions: int) -> dict[str, object]:
    """One variant, built and asked."""
    recipe = Recipe.load("small-bf16", (*overrides, f"name={name}"))
    losses: list[float] = []

    def note(title: str, done: int, total: int) -> None:
        if " · loss " in title:
            losses.append(float(title.rpartition(" ")[2]))

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = build(recipe, Path(folder) / name, questions=0, progress=note)
        built = time.monotonic()
        service = Service.load(Source(recipe, report.folder))
        try:
            quiz = run_quiz(service, questions, SEED)
            perplexity = answer_perplexity(service.ready, PICTURES, SEED)
        finally:
            service.close()
    typer.echo(f"{name}: {quiz.accuracy:.1%}, perplexity of answers {perplexity:.4f}", err=True)
    return {
        "accuracy": quiz.accuracy,
        "chance": quiz.chance,
        "by_kind": quiz.by_kind,
        "answer_perplexity": perplexity,
        "text_linear_zeros": report.sparsity,
        "build_s": round(built - started, 1),
        "losses": losses[:: max(1, len(losses) // 20)],
        "digest": recipe.digest(),
    }


if __name__ == "__main__":
    typer.run(main)
