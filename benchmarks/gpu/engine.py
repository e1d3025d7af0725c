"""Stage `engine`: the whole engine with pictures: time to first token, 1 to 16 requests at once, memory, long prompts."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing

import torch

from benchmarks.gpu.common import COMPILE_CACHE, Results, config_of, kernels_of, peak_bytes, random_model, reset_peak
from gemma_opt.engine.core import FastEngine
from gemma_opt.engine.interface import EngineRequest, Finished, SamplingParams
from gemma_opt.engine.kernels.gpu import keeping_compiled
from gemma_opt.gemma import GemmaModel, picture_tokens
from gemma_opt.recipe import Compile, EngineSection

FORMATS = ("int8", "int4-g128", "int4-g32")
TOGETHER = (1, 2, 4, 8, 16)
TEXT_TOKENS, REPLY_TOKENS = 64, 128
MEMORY_TOKENS = 750  # prompt and reply together, one slot: the memory goal's condition
MEMORY_CONTEXT = 752
LONG_TOKENS = (2048, 8000)  # prompts past the window, chunk by chunk
LONG_CONTEXT = 8192
REPEATS = 10
LEAST_MS = 0.3  # of a kernel that is listed


class Prompts:
    """Prompts no two of which begin alike, so that nothing is reused from a slot's cache."""

    def __init__(self, shape: str) -> None:
        config = config_of(shape)
        self._vision = getattr(config, "vision_config", None)
        self._image_token = getattr(config, "image_token_id", None)
        self._soft_tokens = picture_tokens(config)
        self._draw = torch.Generator().manual_seed(0)

    def text(self, tokens: int, new_tokens: int, sampling: SamplingParams | None = None) -> EngineRequest:
        """Random ids; the reply has exactly `new_tokens`."""
        wanted = sampling or SamplingParams(temperature=0, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return EngineRequest((2, *self._ids(tokens - 1)), sampling=wanted)

    def picture(self, new_tokens: int) -> EngineRequest | None:
        """A random picture and 16 tokens of text; None for a text-only model."""
        if self._vision is None or self._image_token is None:
            return None
        side = self._vision.image_size
        image = torch.rand(3, side, side, generator=self._draw) * 2 - 1
        ids = (2, *self._ids(4), *[self._image_token] * self._soft_tokens, *self._ids(12))
        sampling = SamplingParams(temperature=0, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        return EngineRequest(ids, (image,), sampling)

    def _ids(self, count: int) -> list[int]:
        return torch.randint(300, 1000, (count,), generator=self._draw).tolist()


def run(results: Results, shape: str, formats: tuple[str, ...] = FORMATS) -> None:
    """Three entries a format: many slots, one slot for memory, and one for long prompts."""
    for stored in formats:
        results.measure(f"{stored}, 16 slots", lambda s=stored: many_slots(shape, s))
        results.measure(f"{stored}, one slot", lambda s=stored: one_slot(shape, s))
        results.measure(f"{stored}, long prompts", lambda s=stored: long_prompts(shape, s))


def start(shape: str, stored: str, slots: int, context: int) -> tuple[FastEngine, dict[str, object]]:
    """An engine over random weights, and what starting it took beside making the weights.

    The first start of a process compiles, unless an earlier stage left its kernels in COMPILE_CACHE.
    """
    load_s: list[float] = []

    def load() -> GemmaModel:
        began = time.monotonic()
        model = random_model(shape, stored)
        load_s.append(time.monotonic() - began)
        return model

    settings = EngineSection(slots=slots, queue=max(TOGETHER), context=context)
    warm_up = Prompts(shape).picture(8) or Prompts(shape).text(16, 8)
    began = time.monotonic()
    with keeping_compiled(COMPILE_CACHE):
        engine = FastEngine(load, settings, Compile(), lambda: warm_up, compile_cache=COMPILE_CACHE)
    return engine, {"setup_s_without_weights": round(time.monotonic() - began - load_s[0], 1)}


def finish(engine: FastEngine, requests: Sequence[EngineRequest]) -> tuple[list[Finished], float]:
    """Run requests at once; their summaries and the seconds until the last had ended."""
    began = time.perf_counter()
    generations = [engine.submit(request) for request in requests]
    for generation in generations:
        for _ in generation:
            pass
    return [generation.finished for generation in generations], time.perf_counter() - began


def first_token_ms(engine: FastEngine, requests: Sequence[EngineRequest]) -> dict[str, float]:
    """Median and worst time to the first token, one request after another."""
    times = [finished.time_to_first_token_s or 0.0 for request in requests for finished in finish(engine, [request])[0]]
    return {"median": 1e3 * statistics.median(times), "worst": 1e3 * max(times)}


def many_slots(shape: str, stored: str) -> dict[str, object]:
    """Time to first token, then total and per-request rates for more and more requests at once."""
    reset_peak()
    context = min(1024, config_of(shape).get_text_config().max_position_embeddings)
    engine, entry = start(shape, stored, max(TOGETHER), context)
    prompts = Prompts(shape)
    with closing(engine), keeping_compiled(COMPILE_CACHE) as compiled:
        entry["first_token_ms_text_64"] = first_token_ms(engine, [prompts.text(TEXT_TOKENS, 2) for _ in range(REPEATS)])
        pictures = [picture for _ in range(REPEATS) if (picture := prompts.picture(2))]
        if pictures:
            entry["first_token_ms_one_picture"] = first_token_ms(engine, pictures)
        for kind, sampling in (("greedy", None), ("sampled", "default")):
            entry[kind] = [together(engine, prompts, count, sampling) for count in TOGETHER]
        entry["kernels_compiled_while_serving"] = len(compiled)
    return entry | {"peak_bytes": peak_bytes(), "counters": vars(engine.counters)}


def together(engine: FastEngine, prompts: Prompts, count: int, sampling: str | None) -> dict[str, object]:
    """`count` requests at once, each with a prompt of TEXT_TOKENS and a reply of REPLY_TOKENS."""
    requests = [
        prompts.text(
            TEXT_TOKENS,
            REPLY_TOKENS,
            SamplingParams(seed=seed, max_new_tokens=REPLY_TOKENS, min_new_tokens=REPLY_TOKENS) if sampling else None,
        )
        for seed in range(count)
    ]
    finished, seconds = finish(engine, requests)
    tokens = sum(one.output_tokens for one in finished)
    return {
        "requests": count,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_each": statistics.median(one.tokens_per_second or 0.0 for one in finished),
        "first_token_ms": 1e3 * statistics.median(one.time_to_first_token_s or 0.0 for one in finished),
    }


def one_slot(shape: str, stored: str) -> dict[str, object]:
    """Decode rate of one request and the peak of memory at MEMORY_TOKENS, the picture tower's work included."""
    reset_peak()
    engine, entry = start(shape, stored, 1, MEMORY_CONTEXT)
    prompts = Prompts(shape)
    with closing(engine):
        if picture := prompts.picture(2):
            finish(engine, [picture])
        finished, _ = finish(engine, [prompts.text(MEMORY_TOKENS - REPLY_TOKENS, REPLY_TOKENS)])
        entry |= {"tokens_per_second": finished[0].tokens_per_second, "tokens": MEMORY_TOKENS, "peak_bytes": peak_bytes()}
        for kind, request in (("text_64", prompts.text(TEXT_TOKENS, 1)), ("one_picture", prompts.picture(1))):
            if request:
                entry[f"first_token_ms_by_kernel_{kind}"] = by_kernel(lambda one=request: finish(engine, [one]))
    return entry


def long_prompts(shape: str, stored: str) -> dict[str, object]:
    """Time to the first token of prompts that a sliding layer's ring does not hold, and the peak of memory."""
    reset_peak()
    context = min(LONG_CONTEXT, config_of(shape).get_text_config().max_position_embeddings)
    engine, entry = start(shape, stored, 1, context)
    prompts = Prompts(shape)
    with closing(engine):
        for tokens in LONG_TOKENS:
            if tokens < context:
                entry[f"first_token_ms_text_{tokens}"] = first_token_ms(
                    engine, [prompts.text(tokens, 1) for _ in range(REPEATS)]
                )
    return entry | {"peak_bytes": peak_bytes()}


def by_kernel(run: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of each kernel that takes LEAST_MS and more."""
    counts: Counter[str] = Counter()
    sums: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels_of(run):
        counts[kernel.name] += 1
        sums[kernel.name] += kernel.end - kernel.start
    return {name: (counts[name], round(us / 1e3, 2)) for name, us in sums.items() if us >= 1e3 * LEAST_MS}
