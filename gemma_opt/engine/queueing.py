"""One thread that owns the model, a bounded queue in front of it, and the handles that callers hold.

CUDA graphs, compiled code and inference mode are thread-local in torch, and Cog calls predict on changing threads. So
everything that touches the model runs here: it is loaded, compiled, used and dropped on one thread.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

from gemma_opt.engine.interface import EngineRequest, Finished, FinishReason
from gemma_opt.errors import EngineClosed, EngineError, GemmaOptError, GenerationTimeout, PromptTooLong, QueueFull
from gemma_opt.recipe import EngineSection

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "out of GPU memory for this request: send a shorter prompt or fewer pictures"
POLL_S = 0.05  # Cog delivers a cancel at the next bytecode: no wait may block longer than this


class QueuedGeneration:
    """A request on its way, as the engine thread sees it: it pushes token ids in, and a `HeldGeneration` reads them out.

    timeout_s: from now on, waiting included. on_end: told once that no token follows.
    """

    def __init__(
        self, request: EngineRequest, timeout_s: float, on_end: Callable[[QueuedGeneration], None] | None = None
    ) -> None:
        self.request = request
        self.cancelled = False
        self.outbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.ended = threading.Event()
        self.error: GemmaOptError | None = None
        self._timeout_s = timeout_s
        self._on_end = on_end
        self._submitted = time.monotonic()
        self._first: float | None = None
        self._last = self._submitted
        self._count = 0
        self._reason: FinishReason = "cancelled"

    def push(self, token_id: int) -> None:
        """Hand out one token."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._count += 1
        self.outbox.put(token_id)

    def end(self, reason: FinishReason = "cancelled", error: GemmaOptError | None = None) -> None:
        """No token follows. With `error`, the reader's iterator raises it."""
        self._reason, self.error = reason, error
        self.ended.set()
        self.outbox.put(None)
        if self._on_end:
            self._on_end(self)

    @property
    def must_stop(self) -> bool:
        """Cancelled, or out of time: `end_early` is due."""
        return self.cancelled or time.monotonic() > self._submitted + self._timeout_s

    def end_early(self) -> None:
        """End what `must_stop`: quietly if the caller cancelled, else with GenerationTimeout."""
        timed_out = not self.cancelled
        self.end("cancelled", GenerationTimeout(f"no complete reply within {self._timeout_s:g} s") if timed_out else None)

    @property
    def finished(self) -> Finished:
        """The summary, once the generation has ended."""
        if not self.ended.is_set():
            raise RuntimeError("the generation has not ended yet")
        first = self._first
        return Finished(
            reason=self._reason,
            input_tokens=len(self.request.token_ids),
            output_tokens=self._count,
            time_to_first_token_s=None if first is None else first - self._submitted,
            decode_s=0.0 if first is None else self._last - first,
        )


class HeldGeneration:
    """The same as its caller sees it, from any thread. Who lets go of it cancels it.

    Cog raises a cancel between any two lines of a prediction, also before the prediction has got what it submitted.
    """

    def __init__(self, generation: QueuedGeneration) -> None:
        self._generation = generation

    def __del__(self) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[int]:
        outbox = self._generation.outbox
        while True:
            try:
                token_id = outbox.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if token_id is None:
                outbox.put(None)  # a second iteration ends at once too
                if self._generation.error:
                    raise self._generation.error
                return
            yield token_id

    def poll(self) -> list[int]:
        """The token ids that are ready now."""
        outbox = self._generation.outbox
        ready: list[int] = []
        while not outbox.empty():
            token_id = outbox.get()
            if token_id is None:
                outbox.put(None)
                break
            ready.append(token_id)
        return ready

    def rest(self, seconds: float) -> None:
        """Let tokens gather: return after that time, or as soon as no further one follows."""
        self._generation.ended.wait(seconds)

    def cancel(self) -> None:
        """Stop as soon as possible."""
        self._generation.cancelled = True

    @property
    def finished(self) -> Finished:
        """The summary, once the generation has ended."""
        return self._generation.finished


class Worker(Protocol):
    """Owns the model, on the engine thread alone."""

    def add(self, generation: QueuedGeneration) -> None:
        """Take a request in. Its generation must be ended some time, by a reason or by an error."""
        ...

    def turn(self) -> bool:
        """Do a short piece of work. False: nothing is left to do until the next request."""
        ...


def warm_up(worker: Worker, request: EngineRequest) -> None:
    """Answer a request without a time limit, on the calling thread. Raises what ended it early."""
    generation = QueuedGeneration(request, math.inf)
    worker.add(generation)
    while worker.turn():
        pass
    for _ in HeldGeneration(generation):
        pass


class EngineThread:
    """Runs a worker on a thread of its own, and a bounded line of requests in front of it.

    start: called first, on that thread; loads the model and returns its worker. As many requests may run and wait together as
    the settings have slots and places in the queue. The constructor returns when `start` has, and raises what it raised. What
    escapes a turn ends the engine: a model in an unknown state (a broken CUDA context) must not answer anyone.
    """

    def __init__(self, start: Callable[[], Worker], settings: EngineSection) -> None:
        self._context, self._timeout_s = settings.context, settings.timeout_s
        self._capacity = settings.slots + settings.queue
        self._inbox: queue.SimpleQueue[QueuedGeneration | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[QueuedGeneration] = set()
        self._closed = False
        self._failure: BaseException | None = None
        ready = threading.Event()
        self._thread = threading.Thread(target=self._main, args=(start, ready), name="gemma-opt engine", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._thread.is_alive() and not self._closed

    def submit(self, request: EngineRequest) -> HeldGeneration:
        """Queue a request. Raises PromptTooLong, QueueFull or EngineClosed."""
        if len(request.token_ids) > self._context - 1:
            raise PromptTooLong(f"the prompt has {len(request.token_ids):,} tokens, at most {self._context - 1:,} fit")
        generation = QueuedGeneration(request, self._timeout_s, self._forget)
        held = HeldGeneration(generation)  # before it is queued: a cancel from here on lets go of it
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine has stopped; the server must be restarted")
            if sum(not entry.cancelled for entry in self._open) >= self._capacity:
                raise QueueFull(f"{self._capacity} requests are running or waiting; try again later")
            self._open.add(generation)
            self._inbox.put(generation)
        return held

    def close(self) -> None:
        """Cancel everything and join the thread."""
        with self._lock:
            self._closed = True
            for generation in self._open:
                generation.cancelled = True
        self._inbox.put(None)
        self._thread.join()

    def _forget(self, generation: QueuedGeneration) -> None:
        with self._lock:
            self._open.discard(generation)

    def _main(self, start: Callable[[], Worker], ready: threading.Event) -> None:
        try:
            worker = start()
        except BaseException as error:
            self._closed = True
            self._failure = error
            if isinstance(error, Exception):
                return  # the constructor raises it
            raise
        finally:
            ready.set()
        try:
            self._work(worker)
        except BaseException:
            self._end_all(EngineError("internal error"))
            raise
        self._end_all(EngineClosed("the engine has stopped"))

    def _work(self, worker: Worker) -> None:
        busy = False
        while True:
            while not (busy and self._inbox.empty()):  # waits where there is nothing to do
                generation = self._inbox.get()
                if generation is None:
                    return
                worker.add(generation)
                busy = True
            busy = worker.turn()

    def _end_all(self, error: GemmaOptError) -> None:
        with self._lock:
            self._closed = True
            left = list(self._open)
        for generation in left:
            generation.end(error=None if generation.cancelled else error)
