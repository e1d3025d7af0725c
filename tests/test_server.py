"""What clients of Cog's HTTP server see: answers, streams, metrics, cancels and errors, with the bundled model."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from server import ROOT, CogServer

from gemma_opt import charts
from gemma_opt.loading import DEFAULT_RECIPE
from gemma_opt.recipe import Recipe

pytestmark = pytest.mark.timed

QUESTION = "Describe the picture."
FREED_S = 0.25  # promised: after this a cancelled request's place is another's
ENGINE_FREED_S = 2.0  # far below the time of 1,500 tokens: nobody may wait for those to be made
METRICS = {
    "input_token_count", "output_token_count", "image_count", "seed", "finish_reason",
    "time_to_first_token", "tokens_per_second",
}  # fmt: skip


def greedy(prompt: str, tokens: int) -> dict[str, object]:
    """A request whose answer is always the same and exactly so long."""
    return {"prompt": prompt, "temperature": 0, "min_new_tokens": tokens, "max_new_tokens": tokens}


LONG = greedy("Count.", 1500)


@pytest.fixture
def server(cog_server: CogServer) -> Iterator[CogServer]:
    """The running server; what it logs during a failing test appears in the report."""
    start = cog_server.log.stat().st_size
    yield cog_server
    print(cog_server.log.read_text("utf-8", errors="replace")[start:])  # noqa: T201


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.fixture(scope="session")
def picture() -> str:
    """A chart as a data URI, as Cog's command line sends `-i image=@chart.png`."""
    example = ROOT / "examples/chart.png"
    return data_uri(Image.open(example) if example.is_file() else charts.draw("test", 0, 0).image)


def failure(server: CogServer, **inputs: object) -> str:
    """The error text of a prediction that must fail, made sure that it gives nothing internal away."""
    with server.stream(inputs) as stream:
        answer = stream.finish()
    assert (answer.status, answer.text, answer.logs) == ("failed", "", "")
    assert "log" not in stream.events
    for secret in ("0x", "Traceback", str(ROOT)):
        assert secret not in answer.error
    return answer.error


# Answers


def test_answers_with_text(server: CogServer) -> None:
    answer = server.predict(**greedy("What is a bar chart?", 16))
    assert answer.status == "succeeded"
    assert answer.text


def test_answers_about_a_picture(server: CogServer, picture: str) -> None:
    answer = server.predict(**greedy(QUESTION, 16), image=picture)
    assert answer.status == "succeeded"
    assert answer.text
    assert answer.metrics["image_count"] == 1


def test_counts_every_picture(server: CogServer, picture: str) -> None:
    answer = server.predict(prompt=QUESTION, image=picture, images=[picture, picture], max_new_tokens=1)
    assert answer.metrics["image_count"] == 3


def test_messages_ask_what_prompt_and_picture_ask(server: CogServer, picture: str) -> None:
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    plain = server.predict(**greedy(QUESTION, 24), image=picture, system_prompt="")
    messages = server.predict(**greedy("", 24), messages=[{"role": "user", "content": parts}])
    assert messages.text == plain.text
    assert messages.metrics["input_token_count"] == plain.metrics["input_token_count"]


def test_stream_is_the_answer_in_pieces(server: CogServer) -> None:
    request = greedy("Tell me about charts.", 96)
    with server.stream(request) as stream:
        chunks = list(stream)
    assert len(chunks) > 1
    assert stream.answer is not None
    assert "".join(chunks) == stream.answer.text == server.predict(**request).text


def test_metrics_are_complete_and_plausible(server: CogServer) -> None:
    answer = server.predict(prompt="Hello", max_new_tokens=12, min_new_tokens=12, seed=7)
    assert set(answer.metrics) >= METRICS
    measured = {name: answer.metrics[name] for name in ("output_token_count", "image_count", "finish_reason", "seed")}
    assert measured == {"output_token_count": 12, "image_count": 0, "finish_reason": "length", "seed": 7}
    for name in ("input_token_count", "time_to_first_token", "tokens_per_second"):
        value = answer.metrics[name]
        assert isinstance(value, int | float)
        assert value > 0


def test_each_metric_is_one_event(server: CogServer) -> None:
    """Every event counts against the 1,024 that a slow reader may lag behind."""
    with server.stream({"prompt": "Hello", "max_new_tokens": 4, "min_new_tokens": 4}) as stream:
        stream.finish()
    assert stream.events.count("metric") == len(METRICS)


def test_same_seed_same_text(server: CogServer) -> None:
    request = greedy("Once", 24) | {"temperature": 2, "top_p": 1, "top_k": 0}
    drawn = server.predict(**request)
    assert server.predict(**request, seed=drawn.metrics["seed"]).text == drawn.text
    others = {server.predict(**request, seed=seed).text for seed in (1, 2, 3)}
    assert len(others) > 1


@pytest.mark.parametrize("as_list", [False, True])
def test_stop_sequence_ends_the_answer_and_is_not_sent(server: CogServer, *, as_list: bool) -> None:
    request = greedy("Tell me about charts.", 48)
    whole = server.predict(**request).text
    stop = whole[len(whole) // 2 :][:3]
    answer = server.predict(**request, stop_sequences=[stop, "never written"] if as_list else stop)
    assert answer.text == whole[: whole.index(stop)]
    assert answer.metrics["finish_reason"] == "stop_sequence"


def test_prediction_under_an_id_of_the_clients_choice(server: CogServer) -> None:
    body = {"input": {"prompt": "Hello", "max_new_tokens": 2}}
    response = httpx.put(f"{server.url}/predictions/my-own-id", json=body, timeout=30)
    while response.status_code == 409:
        response = httpx.put(f"{server.url}/predictions/my-own-id", json=body, timeout=30)
    assert (response.json()["id"], response.json()["status"]) == ("my-own-id", "succeeded")


# Clients that do not wait for the end


def served_after(server: CogServer, moment: float) -> float:
    """Seconds until another request was accepted; it is also answered, and without waiting for the one before."""
    with server.stream({"prompt": "Next", "max_new_tokens": 4}) as stream:
        accepted_s = stream.accepted_at - moment
        answer = stream.finish()
    assert answer.status == "succeeded"
    first_token_s = answer.metrics["time_to_first_token"]
    assert isinstance(first_token_s, float)
    assert first_token_s < ENGINE_FREED_S
    return accepted_s


def test_cancel_frees_the_slot(server: CogServer) -> None:
    with server.stream(LONG, "to-be-cancelled") as stream:
        chunks = iter(stream)
        next(chunks)
        assert server.cancel("to-be-cancelled") == 200
        cancelled_at = time.monotonic()
        list(chunks)
    assert stream.answer is not None
    assert stream.answer.status == "canceled"
    assert served_after(server, cancelled_at) < FREED_S


def test_cancel_of_an_unknown_prediction_is_not_found(server: CogServer) -> None:
    assert server.cancel("nobody-asked-this") == 404


def test_reader_that_leaves_a_stream_frees_the_slot(server: CogServer) -> None:
    with server.stream(LONG) as stream:
        next(iter(stream))
    assert served_after(server, time.monotonic()) < FREED_S


def test_client_that_stops_waiting_for_json_frees_the_slot(server: CogServer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.post(LONG, timeout_s=0.1)
    assert served_after(server, time.monotonic()) < FREED_S


def test_second_request_is_refused_at_once_while_one_runs(server: CogServer) -> None:
    with server.stream(LONG) as stream:
        next(iter(stream))
        response = httpx.post(f"{server.url}/predictions", json={"input": {"prompt": "Me too"}}, timeout=30)
    assert response.status_code == 409


# Requests that are refused


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 2.1}, {"temperature": -0.1}, {"top_p": 1.5}, {"top_k": 1001}, {"top_k": -1}, {"min_p": -0.5},
        {"seed": -1}, {"seed": 2**32}, {"max_new_tokens": 0}, {"max_new_tokens": 8193}, {"max_new_tokens": 1.5},
        {"repetition_penalty": 0}, {"prompt": 3}, {"messages": ["Hello"]}, {"stop_sequences": 1},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_value_out_of_range_is_422(server: CogServer, wrong: dict[str, object]) -> None:
    response = server.post({"prompt": "Hello", **wrong})
    assert response.status_code == 422
    assert next(iter(wrong)) in response.json()["detail"][0]["loc"][-1]


def test_unknown_input_is_ignored(server: CogServer) -> None:
    """LiteLLM and others add fields of their own."""
    assert server.predict(prompt="Hello", max_new_tokens=2, stream_options={}).status == "succeeded"


def test_whole_number_written_as_float_is_accepted(server: CogServer) -> None:
    answer = server.predict(prompt="Hello", max_new_tokens=2.0, min_new_tokens=2.0, top_k=5.0, seed=3.0)
    assert (answer.metrics["output_token_count"], answer.metrics["seed"]) == (2, 3)


@pytest.mark.parametrize(
    ("code", "inputs"),
    [
        ("E1001", {}),
        ("E1001", {"prompt": " \n"}),
        ("E1002", {"prompt": "word " * 3000}),
        ("E1003", {"prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}]}),
        ("E1004", {"messages": []}),
        ("E1004", {"messages": [{"role": "robot", "content": "Hello"}]}),
        ("E1004", {"messages": [{"role": "assistant", "content": "Hello"}]}),
        ("E1004", {"messages": [{"role": "user", "content": [{"type": "video"}]}]}),
        ("E1005", {"prompt": "Hello", "min_new_tokens": 5, "max_new_tokens": 4}),
        ("E1005", {"prompt": "Hello", "stop_sequences": ""}),
        ("E1010", {"prompt": QUESTION, "image": "data:image/png;base64,AAAA"}),
        ("E1010", {"prompt": QUESTION, "image": "data:image/png;base64,!"}),
        ("E1010", {"prompt": QUESTION, "image": "/etc/passwd"}),
        ("E1010", {"prompt": QUESTION, "image": "file:///etc/passwd"}),
        ("E1010", {"prompt": QUESTION, "images": ["predict.py"]}),
        ("E1010", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]}),
    ],
)
def test_refusal_has_a_code(server: CogServer, code: str, inputs: dict[str, object]) -> None:
    """Cog puts its own words and the error's class in front of ours."""
    assert f": {code} " in failure(server, **inputs)


def test_json_clients_get_the_same_error(server: CogServer) -> None:
    answer = server.predict(prompt="")
    assert (answer.status, answer.text) == ("failed", "")
    assert answer.error == failure(server, prompt="")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254"])
def test_picture_is_not_fetched_from_private_addresses(server: CogServer, host: str) -> None:
    """Cog's own download of a Path input would do it (CVE-2026-56712)."""
    assert ": E1011 " in failure(server, prompt=QUESTION, image=f"http://{host}/chart.png")


def test_too_long_a_prompt_is_told_both_numbers(server: CogServer) -> None:
    error = failure(server, prompt="word " * 3000)
    context = Recipe.load(DEFAULT_RECIPE).engine.context
    assert f"{context - 1:,}" in error
    assert f"{context:,}" in error


# The server itself


def test_serves_the_committed_interface_description(server: CogServer) -> None:
    assert server.get("/openapi.json") == json.loads((ROOT / "openapi.json").read_text("utf-8"))


def test_is_ready_after_all_of_this(server: CogServer) -> None:
    deadline = time.monotonic() + 5
    while server.health == "BUSY" and time.monotonic() < deadline:
        pass
    assert server.health == "READY"


def test_unforeseen_failure_is_told_to_the_operator_only(tmp_path: Path, picture: str) -> None:
    """Cog sends a client all that its prediction writes to sys.stderr: tracebacks, other requests' log lines."""
    with CogServer(tmp_path / "server.log", "tests/failing_predictor.py:Predictor") as server:
        assert failure(server, prompt=QUESTION, image=picture).endswith(": E4000 internal error")
        assert failure(server, prompt=QUESTION).endswith(": E4000 internal error")
        assert ": E4002 " in failure(server, prompt=QUESTION)
        assert server.health == "UNHEALTHY"
    log = (tmp_path / "server.log").read_text("utf-8")
    assert "has no attribute" in log or "is not callable" in log
    assert "secret detail at 0x" in log
