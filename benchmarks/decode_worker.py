"""One contestant of benchmarks/decode.py in a process of its own: threads and peak memory are its alone.

    python -m benchmarks.decode_worker CONTESTANT MODEL THREADS CONTEXT

CONTESTANT: `ours:FORMAT` (fp32, int8, int4, int8_dynamic, int8_dynamic_int4; of a folder any format),
`transformers:DTYPE` (fp32, bf16), `transformers-compiled:DTYPE` or `bandwidth`.
MODEL: a base folder, or a published size (gemma-3-1b) with random weights. One JSON line when ready, then one for every
line {"prompt": ids, "tokens": n, "rows": n} on stdin: seconds from the start until each token, and the peak of memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.synthetic import bytes_read, synthetic_model, synthetic_weights
from gemma_opt import gemma, pipeline
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.weights import TextWeights, take_weights
from gemma_opt.recipe import BaseModelSection, Recipe

SLOTS = 8
BANDWIDTH_BYTES = 256 << 20  # far more than any cache holds

Times = list[float]
Work = Callable[[list[int], int, int], tuple[Times, list[int]]]


def packed_weights(model: str, stored: str) -> TextWeights:
    """The text model in a stored format (int8 and int4 with the int8 table), float32 activations."""
    if gemma.BUNDLED.get(model, Path(model)).is_dir():
        base = gemma.load_base(gemma.locate(BaseModelSection(base=model)), torch.float32, torch.device("cpu"))
        table = {"embedding": "fp32"} if stored == "fp32" else {"embedding": "int8", "head": "tied"}
        quantization = {"default": stored, "roles": {"vision": "fp32", "projector": "fp32"} | table}
        tree = {"name": "benchmark", "model": {"base": model, "dtype": "float32"}, "quantization": quantization}
        pipeline.compress(base.model, Recipe.from_tree(tree, "benchmark"))
        return take_weights(base.model, release=True)
    return synthetic_weights(model, stored)


def ours(model: str, stored: str, context: int) -> tuple[Work, int]:
    """This engine's forward: greedy, all rows the same prompt in slots of their own."""
    weights = packed_weights(model, stored)
    text = TextModel(weights, KvCache(weights, slots=SLOTS, context=context))

    def work(prompt: list[int], count: int, rows: int) -> tuple[Times, list[int]]:
        started = time.perf_counter()
        ids = torch.tensor(prompt)
        logits = torch.stack([text.prefill(slot, text.embed(ids), 0) for slot in range(rows)])
        times: Times = []
        tokens: list[int] = []
        slots = torch.arange(rows)
        while True:
            best = logits.argmax(dim=-1)
            tokens.append(int(best[0]))
            times.append(time.perf_counter() - started)
            if len(tokens) == count:
                return times, tokens
            logits = text.decode(best, slots, torch.full_like(slots, len(prompt) + len(tokens) - 1))

    return work, bytes_read(weights)


class _Clock(BaseStreamer):
    """Notes when each token comes out of `generate`."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.times: Times = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter() - self.started)

    def end(self) -> None:
        pass


def transformers(model: str, dtype: str, *, compiled: bool) -> tuple[Work, int]:
    """transformers' generate: dynamic cache and eager, or static cache and a compiled forward."""
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    if gemma.BUNDLED.get(model, Path(model)).is_dir():
        network: PreTrainedModel = gemma.load_base(gemma.locate(BaseModelSection(base=model)), kind, torch.device("cpu")).model
    else:
        network = synthetic_model(model, kind)
    if compiled:
        network.compile()
    settings = {"cache_implementation": "static"} if compiled else {}

    def work(prompt: list[int], count: int, rows: int) -> tuple[Times, list[int]]:
        ids = torch.tensor([prompt] * rows)
        clock = _Clock()  # a streamer serves one row only: with more, only the end is known
        output = network.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            streamer=clock if rows == 1 else None, **settings,
        )  # fmt: skip
        return clock.times[1:], output[0, len(prompt) :].tolist()  # the first `put` is the prompt

    text = [value for name, value in network.named_parameters() if "vision" not in name and "projector" not in name]
    return work, sum(value.nbytes for value in text)


def bandwidth() -> tuple[Work, int]:
    """Seconds to copy, and to read, 256 MiB with torch's threads: what memory gives to this process."""
    source, target = torch.ones(BANDWIDTH_BYTES // 4), torch.ones(BANDWIDTH_BYTES // 4)

    def work(prompt: list[int], count: int, rows: int) -> tuple[Times, list[int]]:
        marks: list[float] = []
        for run in (lambda: target.copy_(source), source.sum):
            times: Times = []
            for _ in range(5):
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
            marks.append(sorted(times)[2])
        return marks, []

    return work, BANDWIDTH_BYTES


@torch.inference_mode()
def main(contestant: str, model: str, threads: int, context: int) -> None:
    """Serve rounds until stdin ends."""
    torch.set_num_threads(threads)
    family, _, variant = contestant.partition(":")
    if family == "ours":
        work, size = ours(model, variant, context)
    elif family == "bandwidth":
        work, size = bandwidth()
    else:
        work, size = transformers(model, variant, compiled=family == "transformers-compiled")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries that print must not disturb the protocol

    def reply(**values: object) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    reply(ready=True, weight_bytes=size)
    for line in sys.stdin:
        order = json.loads(line)
        times, tokens = work(order["prompt"], order["tokens"], order["rows"])
        reply(times=times, tokens=tokens, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
