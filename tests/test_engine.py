"""One conformance suite for every engine: transformers' generate is the oracle; queue, cancel and failures are manners.

Engines are on a GPU where there is one, recordings and all; the oracle stays on the CPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache

import pytest
from models import chart, fresh_model, oracle_tokens, placed_model, processing, shared_model

from gemma_opt import gemma
from gemma_opt.engine.core import FastEngine
from gemma_opt.engine.interface import EngineRequest, SamplingParams
from gemma_opt.engine.reference import ReferenceEngine
from gemma_opt.errors import CompileError, EngineClosed, EngineError, GenerationTimeout, PromptTooLong, QueueFull
from gemma_opt.prompt import EncodedPrompt, PromptEncoder, single_turn
from gemma_opt.recipe import Compile, EngineSection

pytestmark = pytest.mark.timed

CONTEXT = 512
WINDOW = 128  # of the bundled model's sliding layers
FREE_AFTER_CANCEL_S = 0.25
TOKENS = 40
LONG = {"min_new_tokens": TOKENS, "max_new_tokens": 60}

AnyEngine = ReferenceEngine | FastEngine
KINDS = ("reference", "fast")
WIDE = (640, 256)  # pan-and-scan cuts it in crops

PROMPTS = {
    "a picture": single_turn("Which bar is tallest?", "You are a helpful assistant.", [chart()]),
    "two pictures": single_turn("Describe the picture.", "", [chart(1), chart(2)]),
    "pan and scan": single_turn("Describe the picture.", "", [chart(4, WIDE)]),
    "text": single_turn("Who are you?", "", []),
    "past the window": single_turn("How many bars are there? " * 30, "", [chart(3)]),
}


@cache
def encode(name: str) -> EncodedPrompt:
    if name == "one token":
        return EncodedPrompt((2,), (), 0)
    return PromptEncoder(processing(), CONTEXT).encode(PROMPTS[name], pan_and_scan=name == "pan and scan")


@cache
def expected(name: str, count: int = TOKENS) -> list[int]:
    """The oracle's reply."""
    return oracle_tokens(shared_model(), encode(name), count)


def greedy(prompt: EncodedPrompt, count: int = TOKENS, **changes: float) -> EngineRequest:
    return EngineRequest(prompt.token_ids, prompt.images, SamplingParams(max_new_tokens=count, temperature=0, **changes))  # type: ignore[arg-type]


def exactly(name: str, count: int = TOKENS) -> EngineRequest:
    """Greedy, and as many tokens as `expected` has."""
    return greedy(encode(name), count, min_new_tokens=count)


def sampled(name: str, seed: int, count: int = 30) -> EngineRequest:
    prompt = encode(name)
    params = SamplingParams(max_new_tokens=count, min_new_tokens=count, temperature=1.5, top_p=1.0, top_k=0, seed=seed)
    return EngineRequest(prompt.token_ids, prompt.images, params)


def engine_of(
    kind: str,
    load: Callable[[], gemma.GemmaModel] = placed_model,
    compile_section: Compile | None = None,
    **settings: float,
) -> AnyEngine:
    section = EngineSection.model_validate({"context": CONTEXT} | settings)
    if kind == "reference":
        return ReferenceEngine(load, section, compile_section or Compile())
    return FastEngine(load, section, compile_section or Compile(), keep_layers=True)


@pytest.fixture(scope="module", params=KINDS)
def engine(request: pytest.FixtureRequest) -> Iterator[AnyEngine]:
    running = engine_of(request.param, queue=4)
    yield running
    running.close()


def fast_engine(*, run_ahead: bool | None = None, **settings: float) -> FastEngine:
    section = EngineSection.model_validate({"context": CONTEXT} | settings)
    return FastEngine(placed_model, section, Compile(), keep_layers=True, run_ahead=run_ahead)


# Tokens


@pytest.mark.parametrize("name", [*PROMPTS, "one token"])
def test_greedy_tokens_are_those_of_generate(engine: AnyEngine, name: str) -> None:
    assert list(engine.submit(exactly(name))) == expected(name)
    assert (name in ("past the window", "pan and scan")) == (len(encode(name).token_ids) > 2 * WINDOW)
    assert (name == "pan and scan") == (len(encode(name).images) > 2)


def test_up_to_the_slots_end_the_tokens_are_those_of_generate(engine: AnyEngine) -> None:
    room = CONTEXT - len(encode("past the window").token_ids)
    generation = engine.submit(greedy(encode("past the window"), count=8000, min_new_tokens=8000))
    assert list(generation) == expected("past the window", room)
    assert generation.finished.reason == "length"


def test_a_stop_token_ends_the_reply_and_is_not_sent(engine: AnyEngine) -> None:
    generation = engine.submit(greedy(encode("a picture"), count=100))
    tokens = list(generation)
    assert generation.finished.reason == "stop"
    assert not set(tokens) & {1, 106}
    assert generation.finished.output_tokens == len(tokens) < 100


def test_length_ends_the_reply_at_the_limit(engine: AnyEngine) -> None:
    generation = engine.submit(greedy(encode("text"), count=7, min_new_tokens=7))
    assert len(list(generation)) == 7
    assert generation.finished.reason == "length"


def test_a_prompt_that_fills_the_context_is_refused(engine: AnyEngine) -> None:
    engine.submit(EngineRequest((2,) * (CONTEXT - 1))).cancel()
    with pytest.raises(PromptTooLong):
        engine.submit(EngineRequest((2,) * CONTEXT))


def test_min_new_tokens_holds_the_stop_back(engine: AnyEngine) -> None:
    short = list(engine.submit(greedy(encode("a picture"))))
    longer = list(engine.submit(greedy(encode("a picture"), min_new_tokens=len(short) + 3)))
    assert len(longer) >= len(short) + 3
    assert longer[: len(short)] == short


def test_the_same_seed_gives_the_same_reply(engine: AnyEngine) -> None:
    first, again, other = (list(engine.submit(sampled("text", seed))) for seed in (1, 1, 2))
    assert first == again != other


def test_a_second_iteration_ends_at_once(engine: AnyEngine) -> None:
    generation = engine.submit(greedy(encode("text")))
    assert list(generation)
    assert list(generation) == []
    assert generation.poll() == []


def test_cancel_frees_the_slot_quickly(engine: AnyEngine) -> None:
    long = engine.submit(greedy(encode("text"), count=400, min_new_tokens=400))
    next(iter(long))
    started = time.monotonic()
    long.cancel()
    next(iter(engine.submit(greedy(encode("text")))))
    assert time.monotonic() - started < FREE_AFTER_CANCEL_S
    assert len(list(long)) < 400
    assert long.finished.reason == "cancelled"


def test_a_cancelled_request_that_still_waits_never_runs(engine: AnyEngine) -> None:
    running = engine.submit(greedy(encode("text"), count=60, min_new_tokens=60))
    waiting = engine.submit(greedy(encode("text"), count=60, min_new_tokens=60))
    waiting.cancel()
    assert len(list(running)) == 60
    assert list(waiting) == []
    assert waiting.finished.output_tokens == 0


# Queue, limits, failures


def test_who_lets_go_of_a_generation_cancels_it(engine: AnyEngine) -> None:
    """The story: Cog's cancel struck before the prediction had what it had submitted, and its slot worked on for nobody."""
    for _ in range(20):
        engine.submit(exactly("text", 400))
    assert list(engine.submit(exactly("text"))) == expected("text")


@pytest.mark.parametrize("kind", KINDS)
def test_requests_wait_in_order_and_past_the_queue_they_are_refused(kind: str) -> None:
    engine = engine_of(kind, queue=2)
    try:
        request = exactly("text", 60)
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_wall_clock_limit_is_an_error_and_the_engine_goes_on(kind: str) -> None:
    engine = engine_of(kind, timeout_s=0.01, queue=2)
    try:
        with pytest.raises(GenerationTimeout, match="E4003"):
            list(engine.submit(exactly("past the window", 200)))
        assert engine.alive
    finally:
        engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_engine_refuses_and_ends_what_runs(kind: str) -> None:
    engine = engine_of(kind)
    running = engine.submit(exactly("text", 400))
    engine.close()
    assert len(list(running)) < 400
    assert not engine.alive
    with pytest.raises(EngineClosed):
        engine.submit(greedy(encode("text")))


@pytest.mark.parametrize("kind", KINDS)
def test_what_loading_raises_reaches_the_caller(kind: str) -> None:
    def load() -> gemma.GemmaModel:
        raise CompileError("no such thing")

    with pytest.raises(CompileError, match="no such thing"):
        engine_of(kind, load)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_model_ends_the_engine_and_tells_the_client_nothing(kind: str) -> None:
    """A CUDA context in an unknown state must not answer anyone: the health check has to notice instead."""

    def load() -> gemma.GemmaModel:
        model = fresh_model()
        model.get_submodule("model.vision_tower").register_forward_pre_hook(lambda *_: 1 / 0)
        return model

    engine = engine_of(kind, load, slots=2)
    running = engine.submit(exactly("text", 400))
    next(iter(running))
    if kind == "reference":  # one after the other
        running.cancel()
    with pytest.raises(EngineError) as caught:
        list(engine.submit(greedy(encode("a picture"))))
    assert str(caught.value) == "E4000 internal error"
    if kind == "fast":
        with pytest.raises(EngineError, match="internal error"):
            list(running)
    deadline = time.monotonic() + 5
    while engine.alive and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.alive
    engine.close()  # joins the thread, so that its traceback is reported within this test
    with pytest.raises(EngineClosed):
        engine.submit(greedy(encode("text")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets"), [("reference", ("decode", "vision")), ("reference", ("mlp",)), ("fast", ("decode", "vision"))]
)
def test_compiled_targets_give_the_same_tokens(kind: str, targets: tuple[str, ...]) -> None:
    """The static cache of a compiled decode step must not lose the pictures' bidirectional mask, nor the window."""
    engine = engine_of(kind, fresh_model, Compile.model_validate({"targets": targets}))
    try:
        for name in ("a picture", "past the window"):
            assert list(engine.submit(exactly(name))) == expected(name)
        report = engine.compile_report
        assert report.graphs > 0
        assert report.graph_breaks == {}
        assert set(report.targets) <= set(targets)
    finally:
        engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_model_has_no_vision_tower_to_compile(kind: str) -> None:
    """Recipes name vision for the sizes that see; the others serve without."""
    from shapes import small_text_model

    engine = engine_of(kind, lambda: small_text_model(0), Compile(targets=("vision",)))
    try:
        assert engine.compile_report.targets == ()
    finally:
        engine.close()


# Several at once, in the fast engine


NAMES = ("a picture", "text", "past the window", "two pictures", "one token", "pan and scan")


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 16}, {"lookup": 5}, {"prefill_chunk": 33, "lookup": 3}])
def test_all_at_once_every_reply_is_the_oracles(settings: dict[str, float], run_ahead: bool) -> None:
    """Whatever the prompts are cut into, whoever comes and goes beside them, with and without guesses."""
    engine = fast_engine(slots=4, queue=16, run_ahead=run_ahead, **settings)
    try:
        running = [(name, engine.submit(exactly(name))) for name in NAMES * 2]
        for name, generation in running:
            assert list(generation) == expected(name)
        if "lookup" in settings:
            assert engine.counters.right_guesses > 0
    finally:
        engine.close()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_reply_is_unchanged_by_its_neighbours_and_by_their_cancel(run_ahead: bool) -> None:
    engine = fast_engine(slots=4, queue=64, prefill_chunk=48, run_ahead=run_ahead)
    samplings = {seed: sampled(NAMES[seed % len(NAMES)], seed) for seed in range(8)}
    try:
        alone = {seed: list(engine.submit(request)) for seed, request in samplings.items()}
        neighbours = [engine.submit(exactly(NAMES[n % len(NAMES)], 200)) for n in range(3)]
        together = {seed: engine.submit(request) for seed, request in samplings.items()}
        for seed, generation in together.items():
            tokens = iter(generation)
            begun = [next(tokens) for _ in range(5)]
            if seed < len(neighbours):
                neighbours[seed].cancel()
            assert begun + list(tokens) == alone[seed]
        assert all(len(list(neighbour)) < 200 for neighbour in neighbours)
    finally:
        engine.close()


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(**LONG, temperature=0.8, seed=3),
        SamplingParams(**LONG, temperature=0, repetition_penalty=1.3),
        SamplingParams(**LONG, temperature=1.2, top_k=0, top_p=0.9, repetition_penalty=0.8, seed=4),
        SamplingParams(**LONG, temperature=1.0, top_k=600, min_p=0.01, seed=5),
    ],
)
def test_every_way_of_sampling_is_the_references(sampling: SamplingParams) -> None:
    """Guessing included: it must not change the distribution, nor even the draw."""
    reference, fast, guessing = engine_of("reference"), fast_engine(slots=2), fast_engine(slots=2, lookup=6)
    request = EngineRequest(encode("a picture").token_ids, encode("a picture").images, sampling)
    try:
        tokens = list(reference.submit(request))
        assert len(tokens) >= TOKENS
        assert list(fast.submit(request)) == tokens
        assert list(guessing.submit(request)) == tokens
    finally:
        for engine in (reference, fast, guessing):
            engine.close()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_cancel_lets_the_next_in_line_in(run_ahead: bool) -> None:
    engine = fast_engine(slots=2, queue=4, run_ahead=run_ahead)
    try:
        running = [engine.submit(exactly("text", 400)) for _ in range(2)]
        for generation in running:
            next(iter(generation))
        waiting = engine.submit(exactly("a picture"))
        time.sleep(0.02)
        assert waiting.poll() == []
        running[0].cancel()
        assert list(waiting) == expected("a picture")
        assert len(running[1].poll()) < 400
    finally:
        engine.close()


def test_a_long_prompt_does_not_stop_those_who_are_answered() -> None:
    """While 480 tokens are read in chunks of 16, a running reply goes on by one token a turn."""
    engine = fast_engine(slots=2, prefill_chunk=16)
    try:
        running = engine.submit(exactly("text", 400))
        next(iter(running))
        long = engine.submit(greedy(EncodedPrompt((2, *range(300, 779)), (), 0), 1, min_new_tokens=1))
        before = len(running.poll())
        next(iter(long))
        assert len(running.poll()) + before >= 480 // 16 - 3
        running.cancel()
    finally:
        engine.close()


# Work that is not done twice


def test_a_beginning_with_its_picture_is_reused_and_the_reply_is_the_same() -> None:
    engine = fast_engine(slots=1, prefill_chunk=32)
    try:
        assert list(engine.submit(exactly("a picture", 10))) == expected("a picture", 10)
        before = engine.counters.prefilled_tokens
        assert list(engine.submit(exactly("a picture", 10))) == expected("a picture", 10)
        length = len(encode("a picture").token_ids)
        assert engine.counters.prefilled_tokens - before < 32
        assert engine.counters.reused_tokens >= length - 32
        assert engine.counters.pictures_encoded == 1
    finally:
        engine.close()


def test_another_picture_is_not_mistaken_for_the_first() -> None:
    """The soft tokens' ids are the same for all pictures."""
    engine = fast_engine(slots=1)
    encoder = PromptEncoder(processing(), CONTEXT)
    try:
        for index in (5, 6, 5):
            prompt = encoder.encode(single_turn("Describe the picture.", "", [chart(index)]))
            assert list(engine.submit(greedy(prompt, 20, min_new_tokens=20))) == oracle_tokens(shared_model(), prompt, 20)
        assert engine.counters.pictures_encoded == 2
    finally:
        engine.close()


def test_a_beginning_is_copied_from_a_slot_that_is_busy() -> None:
    engine = fast_engine(slots=2, prefill_chunk=32)
    try:
        busy = engine.submit(exactly("a picture", 30))
        next(iter(busy))
        assert list(engine.submit(exactly("a picture"))) == expected("a picture")
        assert engine.counters.reused_tokens > 64
        assert len(list(busy)) == 29
    finally:
        engine.close()


def test_past_the_window_only_what_is_left_is_reused() -> None:
    """The first prompt is long gone from the rings when it is asked again: it must be read again."""
    engine = fast_engine(slots=1, prefill_chunk=32)
    try:
        for _ in range(2):
            assert list(engine.submit(exactly("a picture", 120))) == expected("a picture", 120)
            assert list(engine.submit(exactly("past the window"))) == expected("past the window")
    finally:
        engine.close()


def test_the_layers_are_emptied_once_they_are_packed() -> None:
    model = fresh_model()
    section = EngineSection(context=CONTEXT)
    engine = FastEngine(lambda: model, section, Compile())
    try:
        assert list(engine.submit(exactly("a picture"))) == expected("a picture")
        assert not any(list(layer.parameters()) for layer in gemma.text_layers(model).values())
    finally:
        engine.close()
