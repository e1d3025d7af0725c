"""The engine's conformance: transformers' generate is the oracle; queue, cancel, limits and failures are its manners."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from models import chart, oracle_tokens, processing, shared_model

from gemma_opt import gemma
from gemma_opt.engine.interface import EngineRequest, SamplingParams
from gemma_opt.engine.reference import ReferenceEngine
from gemma_opt.errors import CompileError, EngineClosed, EngineError, GenerationTimeout, PromptTooLong, QueueFull
from gemma_opt.prompt import EncodedPrompt, PromptEncoder, single_turn
from gemma_opt.recipe import Compile, EngineSection

CONTEXT = 512
WINDOW = 128  # of the bundled model's sliding layers
FREE_AFTER_CANCEL_S = 0.25

PROMPTS = {
    "a picture": single_turn("Which bar is tallest?", "You are a helpful assistant.", [chart()]),
    "two pictures": single_turn("Describe the picture.", "", [chart(1), chart(2)]),
    "text": single_turn("Who are you?", "", []),
    "past the window": single_turn("How many bars are there? " * 30, "", [chart(3)]),
}


def encode(name: str) -> EncodedPrompt:
    return PromptEncoder(processing(), CONTEXT).encode(PROMPTS[name])


def greedy(prompt: EncodedPrompt, count: int = 40, **changes: float) -> EngineRequest:
    return EngineRequest(prompt.token_ids, prompt.images, SamplingParams(max_new_tokens=count, temperature=0, **changes))  # type: ignore[arg-type]


def engine_of(
    load: Callable[[], gemma.GemmaModel] = shared_model, compile_section: Compile | None = None, **settings: float
) -> ReferenceEngine:
    section = EngineSection.model_validate({"context": CONTEXT} | settings)
    return ReferenceEngine(load, section, compile_section or Compile())


@pytest.fixture(scope="module")
def engine() -> Iterator[ReferenceEngine]:
    running = engine_of(queue=4)
    yield running
    running.close()


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_generate(engine: ReferenceEngine, name: str) -> None:
    prompt = encode(name)
    tokens = list(engine.submit(greedy(prompt, min_new_tokens=40)))
    assert tokens == oracle_tokens(shared_model(), prompt, 40)
    if name == "past the window":
        assert len(prompt.token_ids) > WINDOW


def test_a_stop_token_ends_the_reply_and_is_not_sent(engine: ReferenceEngine) -> None:
    generation = engine.submit(greedy(encode("a picture"), count=100))
    tokens = list(generation)
    assert generation.finished.reason == "stop"
    assert not set(tokens) & {1, 106}
    assert generation.finished.output_tokens == len(tokens) < 100


def test_length_ends_the_reply_at_the_limit_and_at_the_slots_end(engine: ReferenceEngine) -> None:
    generation = engine.submit(greedy(encode("text"), count=7, min_new_tokens=7))
    assert len(list(generation)) == 7
    assert generation.finished.reason == "length"
    room = engine.submit(greedy(encode("text"), count=8000, min_new_tokens=8000))
    assert len(list(room)) == CONTEXT - len(encode("text").token_ids)
    assert room.finished.reason == "length"


def test_a_prompt_that_fills_the_context_is_refused(engine: ReferenceEngine) -> None:
    engine.submit(EngineRequest((2,) * (CONTEXT - 1))).cancel()
    with pytest.raises(PromptTooLong):
        engine.submit(EngineRequest((2,) * CONTEXT))


def test_min_new_tokens_holds_the_stop_back(engine: ReferenceEngine) -> None:
    short = list(engine.submit(greedy(encode("a picture"))))
    longer = list(engine.submit(greedy(encode("a picture"), min_new_tokens=len(short) + 3)))
    assert len(longer) >= len(short) + 3
    assert longer[: len(short)] == short


def test_the_same_seed_gives_the_same_reply(engine: ReferenceEngine) -> None:
    def sampled(seed: int) -> list[int]:
        prompt = encode("text")
        params = SamplingParams(max_new_tokens=30, min_new_tokens=30, temperature=1.5, top_p=1.0, top_k=0, seed=seed)
        return list(engine.submit(EngineRequest(prompt.token_ids, prompt.images, params)))

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_second_iteration_ends_at_once(engine: ReferenceEngine) -> None:
    generation = engine.submit(greedy(encode("text")))
    assert list(generation)
    assert list(generation) == []
    assert generation.poll() == []


def test_cancel_frees_the_slot_quickly(engine: ReferenceEngine) -> None:
    long = engine.submit(greedy(encode("text"), count=400, min_new_tokens=400))
    next(iter(long))
    started = time.monotonic()
    long.cancel()
    next(iter(engine.submit(greedy(encode("text")))))
    assert time.monotonic() - started < FREE_AFTER_CANCEL_S
    assert len(list(long)) < 400
    assert long.finished.reason == "cancelled"


def test_a_cancelled_request_that_still_waits_never_runs(engine: ReferenceEngine) -> None:
    running = engine.submit(greedy(encode("text"), count=60, min_new_tokens=60))
    waiting = engine.submit(greedy(encode("text"), count=60, min_new_tokens=60))
    waiting.cancel()
    assert len(list(running)) == 60
    assert list(waiting) == []
    assert waiting.finished.output_tokens == 0


def test_requests_wait_in_order_and_past_the_queue_they_are_refused() -> None:
    engine = engine_of(queue=2)
    try:
        request = greedy(encode("text"), count=60, min_new_tokens=60)
        admitted = [engine.submit(request) for _ in range(3)]
        with pytest.raises(QueueFull, match="E1020"):
            engine.submit(request)
        order: list[int] = []
        threads = [threading.Thread(target=lambda n=n: (list(admitted[n]), order.append(n))) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert order == [0, 1, 2]
        list(engine.submit(request))
    finally:
        engine.close()


def test_the_wall_clock_limit_is_an_error_and_the_engine_goes_on() -> None:
    engine = engine_of(timeout_s=0.05, queue=2)
    try:
        with pytest.raises(GenerationTimeout, match="E4003"):
            list(engine.submit(greedy(encode("past the window"), count=200, min_new_tokens=200)))
        assert engine.alive
    finally:
        engine.close()


def test_a_closed_engine_refuses_and_ends_what_runs() -> None:
    engine = engine_of()
    running = engine.submit(greedy(encode("text"), count=400, min_new_tokens=400))
    engine.close()
    assert len(list(running)) < 400
    assert not engine.alive
    with pytest.raises(EngineClosed):
        engine.submit(greedy(encode("text")))


def test_what_loading_raises_reaches_the_caller() -> None:
    def load() -> gemma.GemmaModel:
        raise CompileError("no such thing")

    with pytest.raises(CompileError, match="no such thing"):
        engine_of(load)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_broken_model_ends_the_engine_and_tells_the_client_nothing() -> None:
    """A CUDA context in an unknown state must not answer anyone: the health check has to notice instead."""

    def load() -> gemma.GemmaModel:
        model = gemma.load_base(
            gemma.BaseFiles("small", gemma.BUNDLED["small-gemma3"]), torch.float32, torch.device("cpu")
        ).model
        model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        return model

    engine = engine_of(load)
    with pytest.raises(EngineError) as caught:
        list(engine.submit(greedy(encode("text"))))
    assert str(caught.value) == "E4000 internal error"
    deadline = time.monotonic() + 5
    while engine.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.alive
    engine.close()  # joins the thread, so that its traceback is reported within this test
    with pytest.raises(EngineClosed):
        engine.submit(greedy(encode("text")))


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("decode", "vision"), ("mlp",)])
def test_compiled_targets_give_the_same_tokens(targets: tuple[str, ...]) -> None:
    """The static cache of a compiled decode step must not lose the pictures' bidirectional mask, nor the window."""

    def load() -> gemma.GemmaModel:
        return gemma.load_base(
            gemma.BaseFiles("small", gemma.BUNDLED["small-gemma3"]), torch.float32, torch.device("cpu")
        ).model

    engine = engine_of(load, Compile.model_validate({"targets": targets}))
    try:
        for name in ("a picture", "past the window"):
            prompt = encode(name)
            assert list(engine.submit(greedy(prompt, min_new_tokens=40))) == oracle_tokens(shared_model(), prompt, 40)
        report = engine.compile_report
        assert report.graphs > 0
        assert report.graph_breaks == {}
        assert report.targets == targets
    finally:
        engine.close()


def test_a_text_model_has_no_vision_tower_to_compile() -> None:
    from shapes import small_text_model

    with pytest.raises(CompileError, match="E4001"):
        engine_of(lambda: small_text_model(0), Compile(targets=("vision",)))
