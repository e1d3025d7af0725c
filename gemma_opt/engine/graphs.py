"""What a request needs, recorded once and replayed: one launch for a picture, for a chunk of a prompt, for a decoded token.

Launching hundreds of small kernels from Python takes longer than they run. So at setup each size of a prompt's chunk, and
each pair of a row count (1, 2, 4, … slots) and a sampler level, becomes one CUDA graph, the largest first, all in one memory
pool: they run one after another, and what they give lies outside. Nothing is captured or compiled after that. In service
the smallest recording that fits is taken: missing rows of a step repeat its first slot (`batch.step` allows that), missing
rows of a chunk hold junk. Without a GPU a recording is the function itself, so that all but the capture is the same code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from gemma_opt.engine.batch import Batch, Decode, Level, Sampler, step, step_apart
from gemma_opt.engine.cache import KvCache
from gemma_opt.engine.forward import TextModel
from gemma_opt.engine.kernels import PrefillStep
from gemma_opt.engine.kernels.gpu import find_samplers
from gemma_opt.engine.scheduler import Span, spans_inside
from gemma_opt.engine.weights import TextWeights

log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

Tokens = Callable[[], list[int]]
"""A decode step that is under way: waits for it, and for no later one, and gives a token for each of its slots."""
Steps = Callable[[Sequence[int]], Tokens]
"""Decodes one token of each of some slots and feeds them back into the batch, so that the next step can be launched at once."""


FirstToken = Callable[[Tensor, int, int], int]
"""(logits [vocabulary], slot, position) → the token drawn for that position of the slot and fed into the batch."""


class Prefill(Protocol):
    """Reads a chunk of one slot's prompt: what `TextModel.prefill` promises."""

    def __call__(self, slot: int, embeddings: Tensor, start: int, image_spans: Sequence[Span] = ()) -> Tensor:
        """Float32 logits [vocabulary] after the last token."""
        ...


CHUNK_SIZES = (16, 32, 64, 128, 288, 512, 1024, 2048, 4096)  # of tokens: 16 cost a decode step; a picture and text take 288
UNDER_WAY = 2  # decode steps at most, of which the tokens are not read yet
WARM_UPS = 2  # runs before a capture: compile kernels, allocate what libraries allocate once


def steps_of(decode: Decode, batch: Batch, recorder: Recorder) -> tuple[Steps, FirstToken]:
    """The fastest way to decode, and to begin: on a GPU recorded; elsewhere each row pays only for what it asked for.

    The tokens are the same.
    """
    if batch.tokens.is_cuda:
        samplers = find_samplers(batch)
        return RecordedSteps(decode, batch, recorder, samplers), _FirstToken(batch, samplers)

    def at_once(slots: Sequence[int]) -> Tokens:
        tokens = step_apart(decode, batch, slots).tolist()
        return lambda: tokens

    return at_once, partial(_first_token_apart, batch)


def _first_token_apart(batch: Batch, logits: Tensor, slot: int, position: int) -> int:
    slots, positions = torch.tensor([[slot], [position]], device=logits.device)
    token = batch.draw_apart(logits[None], [slot], positions)
    batch.feed(slots, token, positions)
    return int(token[0])


def prefill_of(model: TextModel, longest: int, recorder: Recorder) -> Prefill:
    """The fastest way to read chunks of up to `longest` tokens: recorded where the device's kernels allow it."""
    if model.prefill_step is None:
        return model.prefill
    return RecordedPrefill(model.prefill_step, model.weights, model.cache, longest, recorder)


class _FirstToken:
    """Draws after a prompt with the samplers that a step has: they must not meet tensors of a kind they do not know."""

    def __init__(self, batch: Batch, samplers: Mapping[Level, Sampler]) -> None:
        self._batch, self._samplers = batch, samplers
        self._slot, self._position = (torch.zeros(1, dtype=torch.int64, device=batch.tokens.device) for _ in range(2))

    def __call__(self, logits: Tensor, slot: int, position: int) -> int:
        """See `FirstToken`."""
        self._slot.fill_(slot)
        self._position.fill_(position - 1)
        return int(self._samplers[self._batch.level([slot])](logits[None], self._slot, self._position)[0])


class Recorder:
    """Turns functions of fixed tensors into ones that do the same without Python: CUDA graphs, which share their memory.

    So a result that is not a tensor made before is valid until the next of them runs, and they must not run at the same
    time. Without a GPU a function stays what it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = 0  # graphs captured so far: must not grow in service
        on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # libraries hold memory for each stream they see

    @contextmanager
    def stream(self) -> Generator[None]:
        """Work in this block is put where recordings are made, after what came before and before what follows."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Callable[[], _Result]) -> Callable[[], _Result]:
        """Runs `run` a few times. What it returns then is the same object every time."""
        if self._stream is None:
            return run
        with self.stream():
            for _ in range(WARM_UPS):
                run()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the GPU meanwhile (a second process's engine, a picture being moved)
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = run()
        self.captures += 1

        def replay() -> _Result:
            graph.replay()
            return result

        return replay


class RecordedSteps:
    """One decode step of any slots. Made on the thread that will call it, while no slot is in use: recording decodes junk.

    decode: as in `batch.step`; on a GPU it must not allocate in a way that a graph cannot hold, nor wait for the host.
    samplers: one of each level, likewise.
    """

    def __init__(self, decode: Decode, batch: Batch, recorder: Recorder, samplers: Mapping[Level, Sampler]) -> None:
        self._decode, self._batch, self._samplers = decode, batch, samplers
        most = batch.tokens.shape[0]
        device = batch.tokens.device
        self._slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._ready = [_HostTokens(most, device) for _ in range(UNDER_WAY)]
        self._turn = 0
        self._held: list[int] = [0] * most  # what `_slots` holds, so that the same rows again need no copy
        self._row_counts = row_counts(most)
        self._recorder = recorder
        started = time.monotonic()
        self._recordings: dict[tuple[int, Level], Callable[[], Tensor]] = {}
        for rows in reversed(self._row_counts):
            for level in reversed(Level):
                self._recordings[rows, level] = self._record(rows, level)
        self._forget_junk()
        if self._recorder.captures:
            log.info("captured %d CUDA graphs in %.1f s", self._recorder.captures, time.monotonic() - started)

    @property
    def captures(self) -> int:
        """CUDA graphs captured so far, prefill's included: must not grow in service."""
        return self._recorder.captures

    def __call__(self, slots: Sequence[int]) -> Tokens:
        """See `Steps`. Of the tokens of UNDER_WAY steps none may be missed."""
        rows = next(count for count in self._row_counts if count >= len(slots))
        wanted = [*slots, *[slots[0]] * (rows - len(slots))]
        if wanted != self._held[:rows]:
            self._slots[:rows].copy_(torch.tensor(wanted), non_blocking=True)
            self._held[:rows] = wanted
        tokens = self._recordings[rows, self._batch.level(slots)]()
        self._turn = (self._turn + 1) % UNDER_WAY
        return self._ready[self._turn].fetch(tokens[: len(slots)])

    def _record(self, rows: int, level: Level) -> Callable[[], Tensor]:
        return self._recorder.record(partial(step, self._decode, self._batch, self._slots[:rows], self._samplers[level]))

    def _forget_junk(self) -> None:
        """Recording has moved slot 0 on; `Batch.start` resets the rest."""
        self._batch.tokens.zero_()
        self._batch.positions.zero_()


class _HostTokens:
    """Tokens on their way to the host, beside whatever the GPU does next."""

    def __init__(self, most: int, device: torch.device) -> None:
        self._tokens = torch.zeros(most, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def fetch(self, tokens: Tensor) -> Tokens:
        """Start copying `tokens`."""
        here, event = self._tokens[: tokens.shape[0]], self._event
        here.copy_(tokens, non_blocking=True)
        if event:
            event.record()

        def wait() -> list[int]:
            if event:
                event.synchronize()
            return here.tolist()

        return wait


class RecordedPrefill:
    """`TextModel.prefill` for chunks of up to `longest` tokens. Made on the thread that will call it, while no slot is in use.

    step: over these weights and this cache.
    """

    def __init__(self, step: PrefillStep, weights: TextWeights, cache: KvCache, longest: int, recorder: Recorder) -> None:
        device, longest = weights.device, min(longest, cache.context)
        self._step, self._cache = step, cache
        self._embeddings = torch.zeros(longest, weights.shape.hidden, dtype=weights.dtype, device=device)
        self._numbers = torch.zeros(2 + 2 * longest, dtype=torch.int64, device=device)  # all in one copy
        self._slot, self._last, self._positions, self._pictures = self._numbers.split([1, 1, longest, longest])
        self._logits = torch.zeros(weights.head.out_features, device=device)
        self._recordings = {size: recorder.record(partial(self._run, size)) for size in reversed(chunk_sizes(longest))}

    def __call__(self, slot: int, embeddings: Tensor, start: int, image_spans: Sequence[Span] = ()) -> Tensor:
        """As `TextModel.prefill`; the logits are valid until the next call."""
        count, longest = embeddings.shape[0], len(self._positions)
        self._cache.check_end(start + count)
        self._embeddings[:count] = embeddings
        positions = torch.arange(start, start + longest).clamp_(max=self._cache.context - 1)
        pictures = torch.zeros_like(positions)
        for number, (begin, stop) in enumerate(spans_inside(image_spans, start, start + count), start=1):
            pictures[begin - start : stop - start] = number
        self._numbers.copy_(torch.cat((torch.tensor([slot, count - 1]), positions, pictures)))
        self._recordings[min(size for size in self._recordings if size >= count)]()
        return self._logits

    def _run(self, size: int) -> None:
        logits = self._step(self._embeddings[:size], self._slot, self._last, self._positions[:size], self._pictures[:size])
        self._logits.copy_(logits)


def chunk_sizes(longest: int) -> tuple[int, ...]:
    """Tokens of the recordings that serve chunks of up to `longest`."""
    return (*(size for size in CHUNK_SIZES if size < longest), longest)


def row_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, … and `most` itself."""
    return (*(2**power for power in range(most.bit_length()) if 2**power < most), most)
