"""How a prediction that runs beside others learns that its client cancelled or left.

Only one form of predict both streams and runs side by side in Cog 0.23: an `async def` that returns a generator. Cog's
worker then reports a cancel to nobody: it calls `cancel()` on the future of the coroutine, and that future is done since
the generator was returned. The call itself is the only sign there is, so we listen to it. A client that closes its
connection is a cancel too.

Should another version of Cog hold no such future, predictions run on as they would without this module, until their
answer is complete or the recipe's `timeout_s` ends it; the log says so.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

log = logging.getLogger(__name__)


class PredictionCancelled(BaseException):
    """Nobody waits for the answer any more. No Exception, like Cog's own: who handles errors must not handle this."""


class Cancellation:
    """A cancel that may come at any time, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._action: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Say that nobody waits for the answer any more."""
        with self._lock:
            self._cancelled, action = True, self._action
        if action:
            action()

    def check(self) -> None:
        """Raise PredictionCancelled if a cancel has come."""
        with self._lock:
            if self._cancelled:
                raise PredictionCancelled

    def then(self, action: Callable[[], None]) -> None:
        """What a cancel does; at once if it has come already."""
        with self._lock:
            self._action, cancelled = action, self._cancelled
        if cancelled:
            action()


def watch_this_prediction() -> Cancellation:
    """The cancel of the prediction whose coroutine is running: call it in `async def predict`, before anything else."""
    cancellation = Cancellation()
    future = _future_of_current_task()
    if future is None:
        log.warning("this version of Cog does not let us see cancels: a cancelled prediction runs to its end")
        return cancellation
    pass_on = future.cancel

    def cancel() -> bool:
        cancellation.cancel()
        return pass_on()

    future.cancel = cancel  # this one object's: the worker calls it by name
    return cancellation


def _future_of_current_task() -> Future[object] | None:
    """The future that `asyncio.run_coroutine_threadsafe` gave Cog's worker for the coroutine that is running.

    asyncio copies a task's result into that future by a callback of the task, which holds it in its closure.
    """
    callbacks: list[tuple[Callable[..., object], object]] = getattr(asyncio.current_task(), "_callbacks", None) or []
    for callback, _context in callbacks:
        for cell in getattr(callback, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Future):
                return cell.cell_contents
    return None
