"""The service: requests in clients' words, text out, everything counted, nothing leaked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest
from models import BUNDLED, chart

from gemma_opt import gemma
from gemma_opt.cancellation import Cancellation, PredictionCancelled
from gemma_opt.errors import (
    ConflictingInputs,
    EmptyPrompt,
    ImageError,
    InputError,
    MessagesError,
    ParameterError,
    PlanError,
    PromptTooLong,
)
from gemma_opt.evaluation.quiz import data_uri, run_quiz
from gemma_opt.images import DECODED_AT_ONCE, _turn_to_decode  # pyright: ignore[reportPrivateUsage]
from gemma_opt.loading import Source, resolve
from gemma_opt.recipe import Recipe
from gemma_opt.service import Request, Service, _warm_up_request

PICTURE = data_uri(chart())


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    running = Service.load(resolve("small-int8"), "cpu")
    yield running
    running.close()


def ask(service: Service, **inputs: object) -> tuple[str, dict[str, int | float | str]]:
    reply = service.stream(Request(**({"temperature": 0.0} | inputs)))  # type: ignore[arg-type]
    return "".join(reply), reply.metrics


def test_an_answer_comes_with_its_metrics(service: Service) -> None:
    text, metrics = ask(service, prompt="Describe the picture.", image=PICTURE, seed=5.0)
    assert text.startswith("A ")
    assert metrics["image_count"] == 1
    assert metrics["seed"] == 5
    assert metrics["finish_reason"] == "stop"
    assert metrics["input_token_count"] > 64
    assert metrics["output_token_count"] > 5
    assert metrics["time_to_first_token"] > 0
    assert metrics["tokens_per_second"] > 0


def test_messages_say_what_prompt_and_picture_say(service: Service) -> None:
    content = [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": "Describe the picture."}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    plain, plain_metrics = ask(service, prompt="Describe the picture.", image=PICTURE)
    chat, chat_metrics = ask(service, messages=[system, {"role": "user", "content": content}])
    assert chat == plain
    assert chat_metrics["input_token_count"] == plain_metrics["input_token_count"]


def test_image_and_images_come_in_order(service: Service) -> None:
    other = data_uri(chart(2))
    together, metrics = ask(service, prompt="Describe the picture.", image=PICTURE, images=[other])
    listed, _ = ask(service, prompt="Describe the picture.", images=[PICTURE, other])
    assert together == listed
    assert metrics["image_count"] == 2


def test_who_no_longer_wants_the_answer_is_heard_between_pictures(service: Service) -> None:
    """The story: a cancelled request of many large pictures went on decoding them for half a minute."""
    cancellation, asked = Cancellation(), []

    def before_picture() -> None:
        cancellation.check()
        asked.append(1)
        cancellation.cancel()

    with pytest.raises(PredictionCancelled):
        service.stream(Request(prompt="x", images=[PICTURE] * 3), before_picture)
    assert len(asked) == 1


def test_who_no_longer_wants_the_answer_is_heard_while_others_decode(service: Service) -> None:
    cancellation = Cancellation()
    with ExitStack() as others:
        for _ in range(DECODED_AT_ONCE):
            others.enter_context(_turn_to_decode(lambda: None))
        threading.Timer(0.2, cancellation.cancel).start()
        with pytest.raises(PredictionCancelled):
            service.stream(Request(prompt="x", image=PICTURE), cancellation.check)
    assert service.stream(Request(prompt="x", image=PICTURE, max_new_tokens=1)).encoded.image_count == 1


def test_a_stop_sequence_ends_the_answer_and_is_not_sent(service: Service) -> None:
    whole, _ = ask(service, prompt="Describe the picture.", image=PICTURE)
    stop = whole[10:14]
    for stops in (stop, [stop], ["never there", stop]):
        text, metrics = ask(service, prompt="Describe the picture.", image=PICTURE, stop_sequences=stops)
        assert text == whole[: whole.index(stop)]
        assert metrics["finish_reason"] == "stop_sequence"


def test_deltas_join_to_the_text_and_there_are_several(service: Service) -> None:
    reply = service.stream(Request(prompt="Hello", temperature=0, min_new_tokens=300, max_new_tokens=300))
    deltas = list(reply)
    assert len(deltas) > 2
    assert reply.metrics["finish_reason"] == "length"
    assert reply.metrics["output_token_count"] == 300


def test_an_abandoned_stream_cancels_the_generation(service: Service) -> None:
    reply = service.stream(Request(prompt="Hello", temperature=0, min_new_tokens=1500, max_new_tokens=1500))
    stream = iter(reply)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert len(list(reply.generation)) < 1500
    assert ask(service, prompt="Hello")[0]


def test_a_drawn_seed_is_reported_and_repeats_the_answer(service: Service) -> None:
    text, metrics = ask(service, prompt="Hello", temperature=1.8, top_p=1.0, top_k=0, min_new_tokens=20)
    again, _ = ask(service, prompt="Hello", temperature=1.8, top_p=1.0, top_k=0, min_new_tokens=20, seed=metrics["seed"])
    assert text == again


def test_a_context_too_small_for_pictures_serves_text() -> None:
    """The story: the warm-up sent a picture that did not fit, and the service could not start."""
    recipe = Recipe.load("small-int8", ("engine.context=64",))
    with closing(Service.load(Source(recipe), "cpu")) as small:
        assert ask(small, prompt="Hello", system_prompt="")[0]
        with pytest.raises(PromptTooLong):
            small.stream(Request(prompt="Hello", image=PICTURE))


def test_a_decode_step_that_is_not_compiled_is_named(caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe.load("small-int8", ("compile.targets=[decode]",))
    with caplog.at_level("INFO", "gemma_opt"), closing(Service.load(Source(recipe), "cpu")):
        assert "decode is not compiled: the fast engine has a step of its own" in caplog.text
        assert "nothing compiled" in caplog.text


def test_a_context_too_small_for_anything_is_named(service: Service) -> None:
    tokenizer = gemma.load_processing(BUNDLED, gemma.read_config(BUNDLED)).tokenizer
    tokenizer.chat_template = "{{ 'Long-winded. ' * 99 }}"
    recipe = Recipe.load("small-int8", ("engine.context=16",))
    ready = replace(service.ready, recipe=recipe, processing=gemma.Processing(tokenizer, None))
    with pytest.raises(PlanError, match=r"engine\.context is too small to answer anything: .* at most 15 fit"):
        _warm_up_request(ready)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ({}, EmptyPrompt),
        ({"prompt": "  ", "image": "https://example.com/x.png"}, EmptyPrompt),
        ({"prompt": "x", "image": "/etc/passwd"}, ImageError),
        ({"prompt": "x", "image": "data:image/png;base64,aGVsbG8="}, ImageError),
        ({"prompt": "x", "images": [PICTURE] * 17}, ParameterError),
        ({"prompt": "x", "max_new_tokens": 1.5}, ParameterError),
        ({"prompt": "x", "seed": float("inf")}, ParameterError),
        ({"prompt": "x", "top_k": 10**400}, ParameterError),
        ({"prompt": "x", "temperature": float("nan")}, ParameterError),
        ({"prompt": "x", "stop_sequences": [""]}, ParameterError),
        ({"prompt": "word " * 3000}, PromptTooLong),
        ({"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, ConflictingInputs),
        ({"image": PICTURE, "messages": [{"role": "user", "content": "y"}]}, ConflictingInputs),
        ({"system_prompt": "Be rude.", "messages": [{"role": "user", "content": "y"}]}, ConflictingInputs),
        ({"messages": []}, MessagesError),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    service: Service, inputs: dict[str, object], error: type[InputError]
) -> None:
    with pytest.raises(error) as caught:
        service.stream(Request(**inputs))  # type: ignore[arg-type]
    assert str(caught.value).startswith(error.code)


def test_the_bundled_model_sees(service: Service) -> None:
    """A short form of `evaluate --charts 500`: benchmarks/results/small_model.json has 200 questions."""
    seen = run_quiz(service, 90, seed=3)
    blind = run_quiz(service, 90, seed=3, blank=True)
    assert seen.accuracy >= 0.9
    assert blind.accuracy <= blind.chance + 0.05


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        ({"prompt": "a \ud800"}, "E1005 prompt"),
        ({"prompt": "a", "system_prompt": "\udcff"}, "E1005 system_prompt"),
        ({"prompt": "a", "stop_sequences": ["\udcff"]}, "E1005 stop_sequences"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]}, "E1004 messages"),
    ],
)
def test_text_that_is_no_unicode_is_an_input_error(inputs: dict[str, Any], code: str) -> None:
    """It was "internal error": the tokenizer takes no lone surrogates."""
    with pytest.raises(InputError, match=f"{code}: not valid Unicode"):
        Request(**inputs)
