"""What the bundled model can do, uncompressed and compressed: `python -m benchmarks.small_model`.

500 one-word questions about unseen pictures, asked through the service as a client would; the same with the pictures
blanked; perplexity of right answers; bytes. Writes benchmarks/results/small_model.json, which the README quotes.
"""

from __future__ import annotations

import json
import tempfile
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
VARIANTS = {
    "small-bf16": (),
    "small-int8": (),
    "small-int8-pruned": (),
    **dict.fromkeys(("small-int8-dynamic", "small-int8-static", "small-fp8", "small-fp8-static"), ()),
    **dict.fromkeys(("small-int4", "small-int4-gptq", "small-mobile"), ()),
    # What the vision tower's format costs alone.
    **{
        f"small-vision-{stored}": (f"quantization={{default: bf16, roles: {{vision: {stored}}}}}",)
        for stored in ("int8", "fp8_dynamic")
    },
    **{
        f"small-int8-{method}-{ratio * 100:.0f}": (f"sparsity=[{{method: {method}, ratio: {ratio}}}]",)
        for method, ratio in [("magnitude", 0.3), ("magnitude", 0.5), ("layer_norm", 0.3), ("layer_norm", 0.5), ("rows", 0.1)]
    },
}


def main(questions: Annotated[int, typer.Option(min=9)] = 500) -> None:
    """Build every variant in a temporary folder and measure it."""
    result: dict[str, object] = {
        "what": "one-word questions about unseen pictures, greedy, one at a time, through the service",
        "questions": questions,
        "seed": SEED,
        "perplexity_pictures": PICTURES,
        "environment": describe(),
    }
    RESULTS.mkdir(exist_ok=True)
    rows: list[dict[str, object]] = []
    for name, overrides in VARIANTS.items():
        rows.append(measure(name, overrides, questions))
        (RESULTS / "small_model.json").write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", "utf-8")


def measure(name: str, overrides: tuple[str, ...], questions: int) -> dict[str, object]:
    """One variant's figures."""
    source = name if not overrides else "small-int8"
    recipe = Recipe.load(source, (*overrides, f"name={name}"))
    with tempfile.TemporaryDirectory() as folder:
        report = build(recipe, Path(folder) / name, questions=0)
        service = Service.load(Source(recipe, report.folder))
        try:
            seen = run_quiz(service, questions, SEED)
            blind = run_quiz(service, questions, SEED, blank=True)
            perplexity = answer_perplexity(service.ready, PICTURES, SEED)
        finally:
            service.close()
    row: dict[str, object] = {
        "recipe": name,
        "bytes": report.bytes,
        "text_linear_zeros": report.sparsity,
        "accuracy": seen.accuracy,
        "accuracy_blank": blind.accuracy,
        "chance": seen.chance,
        "by_kind": seen.by_kind,
        "answer_perplexity": perplexity,
        "digest": recipe.digest(),
    }
    typer.echo(
        f"{name}: {seen.accuracy:.1%} seen, {blind.accuracy:.1%} blank, perplexity {perplexity:.4f}, {report.bytes:,} B",
        err=True,
    )
    return row


if __name__ == "__main__":
    typer.run(main)
