"""Stage `decode`: the text model's captured decode step on random 4B weights: tokens a second and share of bandwidth."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.common import (
    COMPILE_CACHE,
    DEVICE,
    Results,
    copy_gb_s,
    kernels_of,
    median_seconds,
    peak_bytes,
    random_model,
    reset_peak,
    synchronize,
)
from benchmarks.synthetic import bytes_read
from gemma_opt.engine.batch import Batch
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.graphs import RecordedSteps, Recorder
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.engine.kernels import arrangement
from gemma_opt.engine.kernels.gpu import find_samplers, keeping_compiled, tune
from gemma_opt.engine.weights import TextWeights, take_weights

FORMATS = ("int8", "int4-g128", "int4-g32", "bf16")
ROWS = (1, 2, 4, 8, 16)
CONTEXT, POSITION = 1024, 512
STEPS = 64
SAMPLINGS = {"greedy": SamplingParams(temperature=0), "sampled": SamplingParams()}


def run(results: Results, shape: str, formats: tuple[str, ...] = FORMATS) -> None:
    """One entry a format."""
    ceiling = copy_gb_s()
    for stored in formats:
        results.measure(stored, lambda s=stored: measure(shape, s, ceiling))


@torch.inference_mode()
def measure(shape: str, stored: str, ceiling: float) -> dict[str, object]:
    """Setup seconds, then every number of rows at POSITION tokens of context."""
    reset_peak()
    weights = take_weights(random_model(shape, stored), release=True, arrange=arrangement(DEVICE))
    started = time.monotonic()
    tune(weights, COMPILE_CACHE)
    tuned = time.monotonic()
    context = min(CONTEXT, 4 * weights.shape.window)
    cache = KvCache(weights, slots=max(ROWS), context=context)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    with keeping_compiled(COMPILE_CACHE):
        model = TextModel(weights, cache, compile_cache=COMPILE_CACHE)
        batch = Batch(max(ROWS), weights.shape.vocabulary, [1], DEVICE)
        steps = RecordedSteps(model.decode, batch, Recorder(DEVICE), find_samplers(batch))
    entry: dict[str, object] = {
        "weight_bytes_per_step": bytes_read(weights), "copy_gb_s": ceiling, "position": min(POSITION, context // 2),
        "tune_s": round(tuned - started, 1), "capture_s": round(time.monotonic() - tuned, 1), "captures": steps.captures,
        "rows_do_not_depend_on_each_other": same_bits(model, weights),
    }  # fmt: skip
    for kind, sampling in SAMPLINGS.items():
        entry[kind] = [timed(steps, batch, cache, weights, rows, sampling, ceiling) for rows in ROWS]
    entry["layer_us"] = layer_us(lambda: steps([0])(), len(weights.layers))
    return entry | {"captures_after": steps.captures, "peak_bytes": peak_bytes()}


def layer_us(step: Callable[[], object], layers: int) -> list[tuple[str, float]]:
    """The kernels of a layer in order, and microseconds from the end of the one before to its own: medians over the layers."""
    found = kernels_of(step)
    names = [kernel.name for kernel in found]
    for first, period in itertools.product(range(1, 20), range(4, 20)):
        whole = slice(first, first + period * layers)
        if len(names) >= whole.stop and names[whole] == names[first : first + period] * layers:
            took = [after.end - before.end for before, after in zip(found[first - 1 :], found[whole], strict=False)]
            return [(names[first + place], round(statistics.median(took[place::period]), 2)) for place in range(period)]
    return []


def same_bits(model: TextModel, weights: TextWeights) -> bool:
    """Whether logits of a row are the same alone and among 2, 4, … rows at unlike positions. RuntimeError if not."""
    tokens = torch.randint(3, 1000, (max(ROWS),), device=DEVICE)
    slots = torch.arange(max(ROWS), device=DEVICE)
    positions = 100 + 5 * slots
    whole = model.decode(tokens, slots, positions).clone()
    if not torch.isfinite(whole).all():
        raise RuntimeError("logits are not finite")
    wrong = [
        rows for rows in ROWS if not torch.equal(model.decode(tokens[:rows], slots[:rows], positions[:rows]), whole[:rows])
    ]
    if wrong and DEVICE.type == "cuda":
        raise RuntimeError(f"logits change with the number of rows: {wrong}")
    return not wrong


def timed(
    steps: RecordedSteps,
    batch: Batch,
    cache: KvCache,
    weights: TextWeights,
    rows: int,
    sampling: SamplingParams,
    ceiling: float,
) -> dict[str, object]:
    """Tokens a second as the service sees them (each step's tokens on the host before the next) and of the device alone."""
    slots = list(range(rows))
    position = min(POSITION, cache.context // 2)
    for slot in slots:
        batch.start(slot, sampling, [2])
    index = torch.arange(rows, device=DEVICE)

    def rewind() -> None:
        batch.feed(index, torch.full_like(index, 7), torch.full_like(index, position))

    rewind()
    step_s = median_seconds(lambda: steps(slots)(), STEPS)
    rewind()
    synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        steps(slots)
    synchronize()
    device_s = (time.perf_counter() - started) / STEPS
    kv_bytes = rows * sum(2 * layer.keys[0].nbytes * min(position, layer.length) // layer.length for layer in cache.layers)
    moved = bytes_read(weights) + kv_bytes
    return {
        "rows": rows, "tokens_per_second": rows / step_s, "step_ms": 1e3 * step_s, "device_step_ms": 1e3 * device_s,
        "gb_s": moved / step_s / 1e9, "share_of_copy": moved / step_s / 1e9 / ceiling,
    }  # fmt: skip
