"""Several requests at once: `python -m benchmarks.concurrency [--model MODEL --name NAME]`.

1, 2, 4, 8, 16 and 32 requests, submitted together, in rounds that go through all of them: total and per-request tokens a
second and percentiles of the time to first token, the median of the rounds. `speed_up` is a round's total over the same
round's single request; by processor time too, for machines on which other work runs. Adds one entry to
benchmarks/results/concurrency_cpu.json (or _cuda), under the name.
"""

from __future__ import annotations

import json
import statistics
from contextlib import closing
from typing import Annotated

import torch
import typer

from benchmarks.environment import RESULTS, describe
from gemma_opt.loading import resolve
from gemma_opt.service import Service
from gemma_opt.throughput import Throughput, measure, unlike_prompts


def main(
    model: Annotated[str, typer.Option(help="As everywhere: folder, .gguf file, recipe.")] = "small-int8",
    name: Annotated[str | None, typer.Option(help="Key in the results file; by default the recipe's name.")] = None,
    requests: Annotated[str, typer.Option(help="How many at once.")] = "1,2,4,8,16,32",
    prompt_tokens: Annotated[int, typer.Option(min=2)] = 64,
    new_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Measure one model and add it to the results."""
    counts = [int(count) for count in requests.split(",")]
    source = resolve(model)
    with closing(Service.load(source, slots=max(counts), only_serve=True)) as service:
        prompts = unlike_prompts(service, max(counts), prompt_tokens)
        measured = [{count: measure(service, prompts[:count], new_tokens) for count in counts} for _ in range(rounds)]
    file = RESULTS / f"concurrency_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    results = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    results[name or source.recipe.name] = {
        "what": "greedy requests submitted together at the engine; medians over rounds",
        "recipe": source.recipe.model_dump(mode="json", include={"name", "quantization", "engine"}),
        "dtype": source.recipe.model.dtype,
        "slots": max(counts),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "environment": describe(),
        "rows": [summary([one[count] for one in measured], [one[counts[0]] for one in measured]) for count in counts],
    }
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    for row in results[name or source.recipe.name]["rows"]:
        typer.echo(json.dumps(row))


def summary(rounds: list[Throughput], single: list[Throughput]) -> dict[str, object]:
    """Medians over the rounds of one number of requests. single: the same rounds' runs with the fewest."""

    def median(name: str) -> float:
        return statistics.median(getattr(one, name) for one in rounds)

    def speed_up(name: str) -> float:
        return statistics.median(getattr(one, name) / getattr(alone, name) for one, alone in zip(rounds, single, strict=True))

    return {
        "requests": rounds[0].requests,
        "prompt_tokens": rounds[0].prompt_tokens,
        "new_tokens": rounds[0].new_tokens,
        "total_tokens_per_second": median("total_tokens_per_second"),
        "request_tokens_per_second": median("request_tokens_per_second"),
        "time_to_first_token_s": {
            name: statistics.median(one.time_to_first_token_s[name] for one in rounds)
            for name in rounds[0].time_to_first_token_s
        },
        "speed_up": speed_up("total_tokens_per_second"),
        "total_tokens_per_cpu_second": median("total_tokens_per_cpu_second"),
        "speed_up_per_cpu_second": speed_up("total_tokens_per_cpu_second"),
    }


if __name__ == "__main__":
    typer.run(main)
