"""The one thing predict.py knows: load a model, answer requests as streams of text.

A request is checked completely before any expensive work. What goes wrong on the way is an error of our own with a code
and a text that is safe to send to a client; anything else is logged and becomes "internal error".
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from PIL import Image

from gemma_opt import charts
from gemma_opt.checkpoint import COMPILE_CACHE
from gemma_opt.engine.compilation import load_artifacts
from gemma_opt.engine.core import FastEngine
from gemma_opt.engine.interface import Engine, EngineRequest, Finished, Generation, SamplingParams
from gemma_opt.engine.reference import ReferenceEngine
from gemma_opt.errors import (
    ConflictingInputs,
    EngineError,
    GemmaOptError,
    MessagesError,
    ParameterError,
    PlanError,
    PromptTooLong,
)
from gemma_opt.gemma import GemmaModel
from gemma_opt.images import load_image
from gemma_opt.loading import Ready, Source, open_model
from gemma_opt.prompt import MAX_IMAGES, EncodedPrompt, Picture, PromptEncoder, Turn, parse_messages, single_turn
from gemma_opt.text import TextStream

log = logging.getLogger(__name__)

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant."
MIN_CHUNK_INTERVAL_S = 0.04  # Cog drops a client that lags 1,024 events behind: at most 25 a second
WARM_UP_TOKENS = 8

Metric = int | float | str


@dataclass(frozen=True)
class Request:
    """One prediction's inputs, as they arrive. Images are data URIs or http(s) URLs.

    Raises ParameterError or MessagesError where a text is no Unicode: no tokenizer and no UTF-8 knows half a surrogate pair.
    """

    prompt: str = ""
    image: str | None = None
    images: Sequence[str] | None = None
    system_prompt: str = DEFAULT_SYSTEM_PROMPT
    max_new_tokens: float = 512
    min_new_tokens: float = 0
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: float = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_sequences: str | Sequence[str] | None = None
    seed: float | None = None
    messages: Sequence[object] | None = None
    pan_and_scan: bool = False

    def __post_init__(self) -> None:
        wrong = [name for name, value in vars(self).items() if not _is_unicode(value)]
        if wrong:
            kind = MessagesError if wrong == ["messages"] else ParameterError
            raise kind(f"{', '.join(wrong)}: not valid Unicode, half of a surrogate pair stands alone")

    def sampling(self) -> SamplingParams:
        """The sampling parameters, integers made integers, the seed drawn if none was given. Raises ParameterError."""
        stops = [self.stop_sequences] if isinstance(self.stop_sequences, str) else self.stop_sequences or ()
        return SamplingParams(
            max_new_tokens=_integer("max_new_tokens", self.max_new_tokens),
            min_new_tokens=_integer("min_new_tokens", self.min_new_tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=_integer("top_k", self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=secrets.randbits(32) if self.seed is None else _integer("seed", self.seed),
            stop_sequences=tuple(stops),
        )


def _is_unicode(value: object) -> bool:
    """Whether every text in a JSON value is one that UTF-8 can write. Without recursion: a client chooses the depth."""
    open_values = [value]
    while open_values:
        item = open_values.pop()
        if isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError:
                return False
        elif isinstance(item, dict):
            open_values += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            open_values += item
    return True


def _integer(name: str, value: float) -> int:
    """JSON has one kind of number, and Cog passes 2.0 on as a float."""
    if isinstance(value, float) and not value.is_integer():
        raise ParameterError(f"{name} must be a whole number, got {value}")
    return int(value)


@dataclass
class Reply:
    """One answer: iterate it once for the text as it comes; `metrics` is complete after that.

    Abandoning the iterator (an exception thrown into it, `close()`) cancels the generation.
    """

    generation: Generation
    text: TextStream
    encoded: EncodedPrompt
    seed: int
    metrics: dict[str, Metric] = field(default_factory=dict)
    _tokens: int = 0

    def cancel(self) -> None:
        """Stop as soon as possible; from any thread. The iterator then ends."""
        self.generation.cancel()

    def __iter__(self) -> Iterator[str]:
        try:
            with safe_errors():
                yield from self._deltas()
                self.metrics = self._measure(self.generation.finished)
        finally:
            self.generation.cancel()

    def _deltas(self) -> Iterator[str]:
        """Text as it comes. Between two chunks this thread rests: with many streams, waking for each token costs most."""
        for token_id in self.generation:
            delta = "".join(map(self._read, (token_id, *self.generation.poll())))
            if delta:
                yield delta
            if self.text.stopped:
                break
            if delta:
                self.generation.rest(MIN_CHUNK_INTERVAL_S)
        if self.text.stopped:
            self.generation.cancel()
            for _ in self.generation:  # at most the tokens of one more step; afterwards the summary is there
                pass
        if rest := self.text.finish():
            yield rest

    def _read(self, token_id: int) -> str:
        if self.text.stopped:
            return ""
        self._tokens += 1
        return self.text.push(token_id)

    def _measure(self, finished: Finished) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {
            "input_token_count": finished.input_tokens,
            "output_token_count": self._tokens,
            "image_count": self.encoded.image_count,
            "finish_reason": "stop_sequence" if self.text.stopped else finished.reason,
            "seed": self.seed,
        }
        if finished.time_to_first_token_s is not None:
            metrics["time_to_first_token"] = round(finished.time_to_first_token_s, 6)
        if finished.tokens_per_second is not None:
            metrics["tokens_per_second"] = round(finished.tokens_per_second, 3)
        return metrics


class Service:
    """A loaded model behind an engine. Build it with `load`; use from any thread; close it when done."""

    def __init__(self, engine: Engine, ready: Ready) -> None:
        self.ready = ready
        self._engine = engine
        self._encoder = PromptEncoder(ready.processing, ready.context)

    @classmethod
    def load(cls, source: Source, device: str | None = None, *, slots: int | None = None, only_serve: bool = False) -> Self:
        """Load or compress the model on the engine's thread, then answer one warm-up request.

        slots: requests at once, if not as many as the recipe says. only_serve: free what only evaluation uses, the
        model's own text layers. Raises what loading, compression or compilation raise: UsageError, CheckpointError,
        EngineError.
        """
        recipe = source.recipe
        settings = recipe.engine if slots is None else recipe.engine.model_copy(update={"slots": slots})
        opened: list[Ready] = []

        def load_model() -> GemmaModel:
            opened.append(open_model(source, device))  # verifies every hash, the compiled code's too
            if source.folder and recipe.compiled:
                found = load_artifacts(source.folder / COMPILE_CACHE)
                log.info("compiled code for this device: %s", "comes with the checkpoint" if found else "none, compiling now")
            return opened[0].model

        def warm_up() -> EngineRequest:
            return _warm_up_request(opened[0])

        if settings.kind == "reference":
            engine = ReferenceEngine(load_model, settings, recipe.compile, warm_up)
        else:
            compile_cache = source.folder / COMPILE_CACHE if source.folder else None
            engine = FastEngine(
                load_model, settings, recipe.compile, warm_up, keep_layers=not only_serve, compile_cache=compile_cache
            )
        if own := set(recipe.compile.targets) - set(recipe.compiled):
            log.info("%s is not compiled: the fast engine has a step of its own (engine.kind=reference compiles it)", *own)
        log.info("%s is ready; %s", recipe.name, engine.compile_report)
        return cls(engine, opened[0])

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._engine.alive

    def stream(self, request: Request, before_picture: Callable[[], None] = lambda: None) -> Reply:
        """Check and encode a request, queue it, and return its answer's stream. Raises InputError or EngineError.

        before_picture: called before each picture is fetched, and while it waits to be decoded; what it raises ends the
        request.
        """

        def later(source: str) -> Picture:
            def load() -> Image.Image:
                before_picture()
                return load_image(source, while_waiting=before_picture)

            return load

        with safe_errors():
            sampling = request.sampling()
            encoded = self._encoder.encode(self._conversation(request, later), pan_and_scan=request.pan_and_scan)
            text = TextStream(self.ready.processing.tokenizer, sampling.stop_sequences)
            generation = self._engine.submit(EngineRequest(encoded.token_ids, encoded.images, sampling))
            return Reply(generation, text, encoded, sampling.seed)

    def encode(self, turns: Sequence[Turn]) -> EncodedPrompt:
        """Token ids and pixels of a conversation, for `generate`. Raises InputError."""
        return self._encoder.encode(turns)

    def generate(self, prompt: EncodedPrompt, sampling: SamplingParams) -> Generation:
        """The token ids of one answer, below the level of text: what evaluation and benchmarks need. Raises InputError."""
        return self._engine.submit(EngineRequest(prompt.token_ids, prompt.images, sampling))

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _conversation(self, request: Request, later: Callable[[str], Picture]) -> tuple[Turn, ...]:
        if request.messages is not None:
            self._refuse_conflicts(request)
            return parse_messages(request.messages, later)
        sources = [*([request.image] if request.image else []), *(request.images or ())]
        if len(sources) > MAX_IMAGES:
            raise ParameterError(f"at most {MAX_IMAGES} pictures a request, got {len(sources)}")
        return single_turn(request.prompt, self._system_prompt(request), [later(source) for source in sources])

    def _system_prompt(self, request: Request) -> str:
        is_default = request.system_prompt == DEFAULT_SYSTEM_PROMPT
        return "" if is_default and not self._encoder.has_chat_template else request.system_prompt

    @staticmethod
    def _refuse_conflicts(request: Request) -> None:
        given = [name for name in ("prompt", "image", "images") if getattr(request, name)]
        if request.system_prompt not in ("", DEFAULT_SYSTEM_PROMPT):
            given.append("system_prompt")
        if given:
            raise ConflictingInputs(f"messages replace {', '.join(given)}: give one or the other")


def _warm_up_request(ready: Ready) -> EngineRequest:
    """A real prediction, with a picture where the model sees, so that the first client does not wait for compilation."""
    encoded = _warm_up_prompt(ready)
    sampling = SamplingParams(max_new_tokens=WARM_UP_TOKENS, min_new_tokens=WARM_UP_TOKENS, temperature=0)
    return EngineRequest(encoded.token_ids, encoded.images, sampling)


def _warm_up_prompt(ready: Ready) -> EncodedPrompt:
    """Raises PlanError if the context holds not even a short text."""
    encoder = PromptEncoder(ready.processing, ready.context)
    if ready.processing.processor is not None:
        try:
            return encoder.encode(single_turn("Describe the picture.", "", [charts.draw("test", 0, 0).image]))
        except PromptTooLong as error:
            log.warning("warming up with text, a picture does not fit: %s", error.message)
    try:
        return encoder.encode(single_turn("Hello", "", []))
    except PromptTooLong as error:
        raise PlanError(f"engine.context is too small to answer anything: {error.message}") from None


@contextmanager
def safe_errors() -> Generator[None]:
    """Errors of our own pass; of anything else the client learns nothing and the log everything."""
    try:
        yield
    except GemmaOptError:
        raise
    except Exception:
        log.exception("unexpected failure while serving a request")
        raise EngineError("internal error") from None
