"""Speculative decoding by prompt lookup, on and off in turn: `python -m benchmarks.lookup [--model MODEL]`.

Two kinds of text: answers that repeat their prompt (a list of facts, asked to be written again) and prose that does not.
Ratios are medians over rounds of neighbours in time; the tokens of both engines must be equal, or the script ends. Writes
benchmarks/results/lookup_cpu.json.
"""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Annotated

import typer

from benchmarks.environment import RESULTS, describe
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.evaluation.agreement import text_prompts
from gemma_opt.evaluation.perplexity import builtin_text
from gemma_opt.loading import Source, resolve
from gemma_opt.prompt import EncodedPrompt
from gemma_opt.service import Service

FACTS = "Anna is 31 and lives in Rome. Ben is 42 and lives in Oslo. Cleo is 27 and lives in Lima. Dan is 55 and lives in Bern. "


def main(
    model: Annotated[str, typer.Option()] = "small-int8",
    name: Annotated[str | None, typer.Option(help="Key in the results file; by default the recipe's name.")] = None,
    guesses: Annotated[int, typer.Option(min=1, max=15, help="Longest guess.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure one model and add it to the results."""
    source = resolve(model)
    with ExitStack() as opened:
        plain, guessing = (
            opened.enter_context(closing(Service.load(with_lookup(source, most), slots=1, only_serve=True)))
            for most in (0, guesses)
        )
        ids = plain.ready.processing.tokenizer.encode(FACTS * 2, add_special_tokens=False)
        kinds = {
            "repeats its prompt": [EncodedPrompt((2, *ids), (), 0)],
            "prose": text_prompts(plain.ready, builtin_text(), 3),
        }
        found = {kind: compare(plain, guessing, prompts, new_tokens, rounds) for kind, prompts in kinds.items()}
    file = RESULTS / "lookup_cpu.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    results[name or source.recipe.name] = {
        "what": "decode speed with prompt lookup over without, one request, greedy; medians over rounds",
        "guesses": guesses,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "environment": describe(),
        "kinds": found,
    }
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    typer.echo(json.dumps(found, indent=1))


def with_lookup(source: Source, most: int) -> Source:
    """The same model, guessing up to `most` tokens."""
    recipe = source.recipe
    return replace(source, recipe=recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"lookup": most})}))


def compare(plain: Service, guessing: Service, prompts: list[EncodedPrompt], new_tokens: int, rounds: int) -> dict[str, object]:
    """Both engines in turn, round by round. Ends the script if a token differs."""
    ratios: list[float] = []
    rates: list[float] = []
    for _ in range(rounds):
        for prompt in prompts:
            (one, one_rate), (other, other_rate) = (answer(service, prompt, new_tokens) for service in (plain, guessing))
            if one != other:
                raise SystemExit("guessing changed a token")
            ratios.append(other_rate / one_rate)
            rates.append(one_rate)
    return {
        "plain_tokens_per_second": statistics.median(rates),
        "speed_up": statistics.median(ratios),
        "speed_up_range": [min(ratios), max(ratios)],
    }


def answer(service: Service, prompt: EncodedPrompt, new_tokens: int) -> tuple[list[int], float]:
    """Tokens and decode rate of one reply."""
    sampling = SamplingParams(max_new_tokens=new_tokens, min_new_tokens=new_tokens, temperature=0)
    generation = service.generate(prompt, sampling)
    return list(generation), generation.finished.tokens_per_second or 0.0


if __name__ == "__main__":
    typer.run(main)
