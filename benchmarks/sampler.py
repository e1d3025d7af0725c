"""What one draw costs on the CPU at Gemma's vocabulary, by route: `python -m benchmarks.sampler`.

Best of many calls on random logits, beside torch's own argmax, topk and sort of the same logits. Writes
benchmarks/results/sampler_cpu.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import torch
import typer

from benchmarks.environment import RESULTS, describe
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.sampling import SamplingRows, next_tokens_apart, route_of

VOCABULARY = 262_208
CASES = {
    "greedy": SamplingParams(temperature=0),
    "the service's defaults": SamplingParams(),
    "top-k 1000": SamplingParams(top_k=1000),
    "temperature only": SamplingParams(top_k=0, top_p=1.0),
    "top-p only": SamplingParams(top_k=0),
}


def main(rounds: int = 100) -> None:
    """Time every route for 1 and 8 rows, in turn."""
    cases: dict[str, Callable[[], object]] = {}
    for rows in (1, 8):
        logits = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
        for name, sampling in CASES.items():
            cases[f"{name}, {rows} rows"] = _draw(logits, sampling)
        cases[f"torch argmax, {rows} rows"] = lambda logits=logits: logits.argmax(-1)
        cases[f"torch topk 64, {rows} rows"] = lambda logits=logits: logits.topk(64)
    cases["torch sort, 1 rows"] = lambda: logits[:1].sort(descending=True)
    best = dict.fromkeys(cases, float("inf"))
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in cases.items():
                started = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - started)
    result = {
        "what": f"best of {rounds} calls, microseconds, vocabulary {VOCABULARY}",
        "environment": describe(),
        "microseconds": {name: round(seconds * 1e6, 1) for name, seconds in best.items()},
    }
    (RESULTS / "sampler_cpu.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    typer.echo(json.dumps(result["microseconds"], indent=1))


def _draw(logits: torch.Tensor, sampling: SamplingParams) -> Callable[[], object]:
    count = len(logits)
    rows = SamplingRows.of([sampling] * count, logits.device)
    positions, routes = torch.arange(count), [route_of(sampling)] * count
    return lambda: next_tokens_apart(logits, rows, positions, routes)


if __name__ == "__main__":
    typer.run(main)
