"""Drives Cog's own HTTP server on loopback, as `make serve` starts it: start, wait, ask, stop."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

ROOT = Path(__file__).resolve().parents[1]
START_S = 180.0  # imports, compression of the bundled model and warm-up, on a machine that is busy
ANSWER_S = 60.0
POLL_S = 0.005
OK, BUSY = 200, 409

JSON = dict[str, object]


@dataclass(frozen=True)
class Answer:
    """The final state of one prediction."""

    status: str
    text: str
    error: str
    logs: str
    metrics: dict[str, object]

    @classmethod
    def read(cls, body: JSON) -> Self:
        """From a JSON answer or the last event of a stream."""
        output, metrics = body.get("output") or [], body.get("metrics") or {}
        assert isinstance(output, list)
        assert isinstance(metrics, dict)
        text = "".join(str(chunk) for chunk in output)
        return cls(str(body["status"]), text, str(body.get("error", "")), str(body.get("logs", "")), metrics)


@dataclass
class EventStream:
    """A running prediction's server-sent events. Iterate for the chunks; after the last one `answer` is there."""

    response: httpx.Response
    accepted_at: float
    answer: Answer | None = None
    events: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._chunks = self._read()  # kept: an iterator that is dropped half-way closes the connection

    def __iter__(self) -> Iterator[str]:
        return self._chunks

    def _read(self) -> Iterator[str]:
        name = ""
        for line in self.response.iter_lines():
            key, _, value = line.partition(": ")
            if key == "event":
                name = value
                self.events.append(name)
            elif key == "data" and name == "output":
                yield json.loads(value)["chunk"]
            elif key == "data" and name == "completed":
                self.answer = Answer.read(json.loads(value))

    def finish(self) -> Answer:
        """Read to the end."""
        for _ in self:
            pass
        assert self.answer is not None, f"the stream ended without a completed event, after {self.events}"
        return self.answer


class CogServer:
    """One server process. Use as a context manager; leaving it ends the whole process group."""

    def __init__(self, log: Path, predictor: str = "predict.py:Predictor") -> None:
        self.log = log
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._predictor = predictor
        self._client = httpx.Client(base_url=self.url, timeout=ANSWER_S)

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "gemma_opt", "serve", "--port", str(self.port), "--predictor", self._predictor]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()
        self._stop()

    def get(self, path: str) -> JSON:
        """A GET's JSON body."""
        return self._client.get(path).json()

    @property
    def health(self) -> str:
        """READY, BUSY, STARTING, ...: the HTTP status is 200 for all of them."""
        return str(self.get("/health-check")["status"])

    def post(self, inputs: JSON, path: str = "/predictions", timeout_s: float = ANSWER_S) -> httpx.Response:
        """Ask and wait for the raw response. The slot stays taken for a moment after an answer: 409 is tried again."""
        deadline = time.monotonic() + ANSWER_S
        while True:
            response = self._client.post(path, json={"input": inputs}, timeout=timeout_s)
            if response.status_code != BUSY or time.monotonic() > deadline:
                return response
            time.sleep(POLL_S)

    def predict(self, **inputs: object) -> Answer:
        """Ask and wait for the JSON answer."""
        response = self.post(inputs)
        assert response.status_code == OK, f"{response.status_code}: {response.text}\n{self.tail()}"
        return Answer.read(response.json())

    @contextmanager
    def stream(self, inputs: JSON, prediction_id: str | None = None) -> Generator[EventStream]:
        """Ask for server-sent events. Leaving early closes the connection, as a client that goes away does."""
        body: JSON = {"input": inputs, **({"id": prediction_id} if prediction_id else {})}
        deadline = time.monotonic() + ANSWER_S
        while True:
            with self._client.stream("POST", "/predictions", json=body, headers={"Accept": "text/event-stream"}) as response:
                if response.status_code != BUSY:
                    assert response.status_code == OK, f"{response.status_code}: {response.read()!r}\n{self.tail()}"
                    yield EventStream(response, time.monotonic())
                    return
            assert time.monotonic() < deadline, f"the slot stayed busy\n{self.tail()}"
            time.sleep(POLL_S)

    def cancel(self, prediction_id: str) -> int:
        """The HTTP status of a cancel."""
        return self._client.post(f"/predictions/{prediction_id}/cancel").status_code

    def tail(self) -> str:
        """The end of the server's log."""
        return self.log.read_text("utf-8", errors="replace")[-6000:]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, f"the server ended with {self._process.returncode}\n{self.tail()}"
            try:
                status = self.health
            except httpx.TransportError:
                status = "not listening"
            if status == "READY":
                return
            assert status in ("not listening", "STARTING", "UNKNOWN"), f"{status}\n{self.tail()}"
            time.sleep(0.1)
        raise TimeoutError(f"not ready within {START_S:g} s\n{self.tail()}")

    def _stop(self) -> None:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, sign)
                self._process.wait(timeout=5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
