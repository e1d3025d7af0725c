"""One thread that owns the model, a bounded queue in front of it, and the handles that callers hold.

CUDA graphs, compiled code and inference mode are thread-local in torch, and Cog calls predict on changing threads. So
everything that touches the model runs here: it is loaded, compiled, used and dropped on one thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator

from gemma_opt.engine.interface import EngineRequest, Finished, FinishReason
from gemma_opt.errors import EngineClosed, EngineError, GemmaOptError, GenerationTimeout, QueueFull

log = logging.getLogger(__name__)

POLL_S = 0.05  # Cog delivers a cancel at the next bytecode: no wait may block longer than this


class QueuedGeneration:
    """A request on its way: the engine thread pushes token ids in, any thread reads them out."""

    def __init__(self, request: EngineRequest, deadline: float) -> None:
        self.request = request
        self.deadline = deadline
        self.cancelled = threading.Event()
        self._submitted = time.monotonic()
        self._first: float | None = None
        self._last = self._submitted
        self._count = 0
        self._outbox: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._error: GemmaOptError | None = None
        self._reason: FinishReason = "cancelled"

    # The engine thread's side

    def push(self, token_id: int) -> None:
        """Hand out one token."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._count += 1
        self._outbox.put(token_id)

    def end(self, reason: FinishReason = "cancelled", error: GemmaOptError | None = None) -> None:
        """No token follows. With `error`, the reader's iterator raises it."""
        self._reason, self._error = reason, error
        self._ended.set()
        self._outbox.put(None)

    @property
    def must_stop(self) -> bool:
        """Cancelled, or out of time (then the generation is ended with GenerationTimeout)."""
        return self.cancelled.is_set() or time.monotonic() > self.deadline

    # The caller's side

    def __iter__(self) -> Iterator[int]:
        while True:
            try:
                token_id = self._outbox.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if token_id is None:
                self._outbox.put(None)  # a second iteration ends at once too
                if self._error:
                    raise self._error
                return
            yield token_id

    def poll(self) -> list[int]:
        """The token ids that are ready now."""
        ready: list[int] = []
        while not self._outbox.empty():
            token_id = self._outbox.get()
            if token_id is None:
                self._outbox.put(None)
                break
            ready.append(token_id)
        return ready

    def cancel(self) -> None:
        """Stop as soon as possible."""
        self.cancelled.set()

    @property
    def finished(self) -> Finished:
        """The summary, once the generation has ended."""
        if not self._ended.is_set():
            raise RuntimeError("the generation has not ended yet")
        first = self._first
        return Finished(
            reason=self._reason,
            input_tokens=len(self.request.token_ids),
            output_tokens=self._count,
            time_to_first_token_s=None if first is None else first - self._submitted,
            decode_s=0.0 if first is None else self._last - first,
        )


Serve = Callable[[QueuedGeneration], FinishReason]


class EngineThread:
    """Runs one request after another on a thread of its own.

    start: called first, on that thread; loads the model and returns the function that serves one generation.
    waiting: how many requests may wait behind the running one. The constructor returns when `start` has, and raises
    what it raised. A failure inside `serve` that is not the request's own ends the engine: a model in an unknown
    state (a broken CUDA context) must not answer anyone.
    """

    def __init__(self, start: Callable[[], Serve], *, waiting: int, timeout_s: float) -> None:
        self._capacity = waiting + 1
        self._timeout_s = timeout_s
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

    def submit(self, request: EngineRequest) -> QueuedGeneration:
        """Queue a request. Raises QueueFull or EngineClosed."""
        generation = QueuedGeneration(request, time.monotonic() + self._timeout_s)
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine has stopped; the server must be restarted")
            self._open = {entry for entry in self._open if not entry.cancelled.is_set()}
            if len(self._open) >= self._capacity:
                raise QueueFull(f"{self._capacity} requests are running or waiting; try again later")
            self._open.add(generation)
            self._inbox.put(generation)
        return generation

    def close(self) -> None:
        """Cancel everything and join the thread."""
        with self._lock:
            self._closed = True
            for generation in self._open:
                generation.cancel()
        self._inbox.put(None)
        self._thread.join()

    def _main(self, start: Callable[[], Serve], ready: threading.Event) -> None:
        try:
            serve = start()
        except BaseException as error:
            self._closed = True
            self._failure = error
            if isinstance(error, Exception):
                return  # the constructor raises it
            raise
        finally:
            ready.set()
        try:
            while (generation := self._inbox.get()) is not None:
                self._serve_one(serve, generation)
        finally:
            self._refuse_the_rest()

    def _serve_one(self, serve: Serve, generation: QueuedGeneration) -> None:
        try:
            reason = "cancelled" if generation.must_stop else serve(generation)
        except GemmaOptError as error:
            generation.end(error=error)
        except BaseException:
            generation.end(error=EngineError("internal error"))
            raise
        else:
            timed_out = reason == "cancelled" and not generation.cancelled.is_set()
            generation.end(reason, GenerationTimeout(f"no complete reply within {self._timeout_s:g} s") if timed_out else None)
        finally:
            with self._lock:
                self._open.discard(generation)

    def _refuse_the_rest(self) -> None:
        with self._lock:
            self._closed = True
            left = list(self._open)
        for generation in left:
            generation.end(error=None if generation.cancelled.is_set() else EngineClosed("the engine has stopped"))
