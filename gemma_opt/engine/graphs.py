"""The decode step, sampler included, recorded once for every number of rows and replayed: one launch a token.

At setup each pair of a row count (1, 2, 4, … slots) and a sampler level becomes one CUDA graph, the largest first, all in one
memory pool; nothing is captured or compiled after that. In service a step picks the smallest recording that fits and
fills missing rows with the first slot again (`batch.step` allows that). Without a GPU a recording is the step itself, so
that everything but the capture is the same code.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from gemma_opt.engine.batch import Batch, Decode, Level, Sampler, step, step_apart
from gemma_opt.engine.kernels.gpu import find_samplers

log = logging.getLogger(__name__)

WARM_UPS = 2  # runs before a capture: compile kernels, allocate what libraries allocate once


def steps_of(decode: Decode, batch: Batch) -> Callable[[Sequence[int]], Tensor]:
    """The fastest way to decode one token of each of some slots: int64 [slots], fed back into the batch.

    On a GPU recorded; elsewhere each row pays only for the sampling that it asked for. The tokens are the same.
    """
    return RecordedSteps(decode, batch) if batch.tokens.is_cuda else partial(step_apart, decode, batch)


class RecordedSteps:
    """One decode step of any slots. Made on the thread that will call it, while no slot is in use: recording decodes junk.

    decode: as in `batch.step`; on a GPU it must not allocate in a way that a graph cannot hold, nor wait for the host.
    samplers: one of each level, likewise; by default the fastest that the device has.
    """

    def __init__(self, decode: Decode, batch: Batch, samplers: Mapping[Level, Sampler] | None = None) -> None:
        self._decode, self._batch, self._samplers = decode, batch, samplers or find_samplers(batch)
        most = batch.tokens.shape[0]
        device = batch.tokens.device
        self._slots = torch.zeros(most, dtype=torch.int64, device=device)
        self._held: list[int] = [0] * most  # what `_slots` holds, so that the same rows again need no copy
        self._row_counts = row_counts(most)
        self._recorder = _Recorder(device)
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
        """CUDA graphs captured so far: must not grow in service."""
        return self._recorder.captures

    def __call__(self, slots: Sequence[int]) -> Tensor:
        """Decode one token of each slot: int64 [slots], valid until the next call. Fed back into the batch already."""
        rows = next(count for count in self._row_counts if count >= len(slots))
        wanted = [*slots, *[slots[0]] * (rows - len(slots))]
        if wanted != self._held[:rows]:
            self._slots[:rows].copy_(torch.tensor(wanted), non_blocking=True)
            self._held[:rows] = wanted
        return self._recordings[rows, self._batch.level(slots)]()[: len(slots)]

    def _record(self, rows: int, level: Level) -> Callable[[], Tensor]:
        return self._recorder.record(partial(step, self._decode, self._batch, self._slots[:rows], self._samplers[level]))

    def _forget_junk(self) -> None:
        """Recording has moved slot 0 on; `Batch.start` resets the rest."""
        self._batch.tokens.zero_()
        self._batch.positions.zero_()


class _Recorder:
    """Turns a function of fixed tensors into one that does the same without Python: a captured CUDA graph.

    The result is then the same tensor every time, in memory that the graphs share: valid until the next of them runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.captures = 0
        self._on_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if not self._on_gpu:
            return run
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the GPU meanwhile (a second process's engine, a picture being moved)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
        self.captures += 1

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def row_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, … and `most` itself."""
    return (*(2**power for power in range(most.bit_length()) if 2**power < most), most)
