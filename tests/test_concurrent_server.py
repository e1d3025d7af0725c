"""ConcurrentPredictor on Cog's real server: eight streams side by side, and clients that do not wait for the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import httpx
import pytest
from server import Answer, CogServer

pytestmark = pytest.mark.timed

AT_ONCE = 8
MANY_TOKENS = 400  # enough that answers, not requests, take the time
LONG_TOKENS = 1900
SIDE_BY_SIDE_TOKENS = 1000


def greedy(prompt: str, tokens: int) -> dict[str, object]:
    """A request whose answer is always the same and exactly so long."""
    return {"prompt": prompt, "temperature": 0, "min_new_tokens": tokens, "max_new_tokens": tokens}


LONG = greedy("Count.", LONG_TOKENS)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    log = tmp_path_factory.mktemp("cog") / "server.log"
    with CogServer(log, "predict.py:ConcurrentPredictor") as running:
        yield running
    print(log.read_text("utf-8", errors="replace"))  # noqa: T201


def stream_together(server: CogServer, prompts: list[str], tokens: int) -> tuple[list[Answer], list[int], float]:
    """Answers, the order in which chunks arrived (by prompt), and the seconds it took."""
    answers: list[Answer | None] = [None] * len(prompts)
    arrivals: list[int] = []
    all_here = threading.Barrier(len(prompts))

    def read(index: int) -> None:
        all_here.wait()
        with server.stream(greedy(prompts[index], tokens)) as stream:
            for _ in stream:
                arrivals.append(index)
            answers[index] = stream.finish()

    started = time.monotonic()
    threads = [threading.Thread(target=read, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answer for answer in answers if answer], arrivals, time.monotonic() - started


@contextmanager
def eight_long_streams(server: CogServer) -> Generator[None]:
    """Eight clients that have each read the first chunk of a long answer. Leaving closes their connections."""
    begun, leave = threading.Barrier(AT_ONCE + 1), threading.Event()

    def read(index: int) -> None:
        with server.stream(LONG, f"long-{index}") as stream:
            next(iter(stream))
            begun.wait(timeout=60)
            leave.wait()

    threads = [threading.Thread(target=read, args=(index,)) for index in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    begun.wait(timeout=60)
    try:
        yield
    finally:
        leave.set()
        for thread in threads:
            thread.join()


def seconds_until_eight_are_served(server: CogServer) -> float:
    """How long eight short requests take now, waiting for places included."""
    answers, _, seconds = stream_together(server, ["Next"] * AT_ONCE, 2)
    assert [answer.status for answer in answers] == ["succeeded"] * AT_ONCE
    return seconds


def test_eight_streams_interleave_and_each_is_what_it_is_alone(server: CogServer) -> None:
    """Long ones: on a busy machine a client may come a second later than the first, and short answers are complete by then."""
    prompts = [f"Tell me about chart {n}." for n in range(AT_ONCE)]
    answers, arrivals, _ = stream_together(server, prompts, SIDE_BY_SIDE_TOKENS)
    first_end = min(len(arrivals) - arrivals[::-1].index(index) for index in range(AT_ONCE))
    assert set(arrivals[:first_end]) == set(range(AT_ONCE)), "all had begun before any was complete"
    alone = [server.predict(**greedy(prompt, SIDE_BY_SIDE_TOKENS)) for prompt in prompts]
    assert [answer.text for answer in answers] == [answer.text for answer in alone]


def test_each_prediction_gets_its_own_metrics(server: CogServer) -> None:
    """Cog's current scope is another prediction's on the threads that read the streams."""
    prompts = ["Hi" + " there" * n for n in range(AT_ONCE)]
    answers, _, _ = stream_together(server, prompts, 20)
    counts = [answer.metrics["input_token_count"] for answer in answers]
    assert len(set(map(str, counts))) == AT_ONCE
    assert {answer.metrics["output_token_count"] for answer in answers} == {20}


def test_eight_together_are_at_least_twice_as_fast_as_one(server: CogServer) -> None:
    """One of five pairs, each measured one after the other: other work on this machine disturbs both."""
    ratios: list[float] = []
    while len(ratios) < 5 and max(ratios, default=0) < 2:
        _, _, alone_s = stream_together(server, ["Count."], 2 * MANY_TOKENS)
        _, _, together_s = stream_together(server, ["Count."] * AT_ONCE, MANY_TOKENS)
        ratios.append(AT_ONCE * MANY_TOKENS / together_s / (2 * MANY_TOKENS / alone_s))
    assert max(ratios) >= 2, ratios


def test_cancel_ends_the_generation(server: CogServer) -> None:
    with server.stream(LONG, "concurrent-cancel") as stream:
        chunks = iter(stream)
        next(chunks)
        assert server.cancel("concurrent-cancel") == 200
        list(chunks)
    assert stream.answer is not None
    assert stream.answer.status == "canceled"
    tokens = stream.answer.metrics.get("output_token_count", 0)
    assert isinstance(tokens, int | float)
    assert tokens < LONG_TOKENS / 2


def test_eight_run_a_ninth_is_refused_and_readers_that_leave_free_their_places(server: CogServer) -> None:
    """In Cog's own hands these generations would run to their ends: their time is what the places are free long before."""
    started = time.monotonic()
    with server.stream(LONG) as stream:
        stream.finish()
    whole_s = time.monotonic() - started
    with eight_long_streams(server):
        refused = httpx.post(f"{server.url}/predictions", json={"input": {"prompt": "Me too"}}, timeout=30)
    assert refused.status_code == 409
    assert seconds_until_eight_are_served(server) < whole_s / 2


def test_a_refusal_has_its_code_here_too(server: CogServer) -> None:
    with server.stream({"prompt": ""}) as stream:
        answer = stream.finish()
    assert (answer.status, answer.text) == ("failed", "")
    assert ": E1001 " in answer.error
