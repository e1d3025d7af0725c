"""The Cog predictors: inputs in, streamed text out. Everything else is `gemma_opt.service`.

Cog reads this file's signatures without running it, so every limit is a literal here; tests/test_openapi.py compares
them with the library's. Images are declared as strings on purpose: for a Path, Cog itself would download any URL,
private addresses included (README, "Limits").
"""

import sys
from collections.abc import Callable, Iterator

import cog
from cog import BasePredictor, ConcatenateIterator, Input

from gemma_opt import logs

logs.set_up("info")  # here, because the imports below bring torch, which reports things that are nobody's business

from gemma_opt.cancellation import Cancellation, PredictionCancelled, watch_this_prediction  # noqa: E402
from gemma_opt.loading import source_from_environment  # noqa: E402
from gemma_opt.service import Metric, Request, Service  # noqa: E402


class Inputs:
    """What a prediction takes, for both predictors. The order in their signatures is the interface's."""

    prompt = Input(description="What to ask. Required unless messages are given.", default="")
    image = Input(description="Picture to ask about: a data URI or an http(s) URL (PNG, JPEG, WEBP, GIF).", default=None)
    images = Input(description="More pictures, after image, in this order.", default=None)
    system_prompt = Input(description="Instruction that precedes the prompt.", default="You are a helpful assistant.")
    max_new_tokens = Input(description="Longest answer, in tokens.", default=512, ge=1, le=8192)
    min_new_tokens = Input(
        description="Shortest answer, in tokens: until then the model cannot stop.", default=0, ge=0, le=8192
    )
    temperature = Input(description="Randomness. 0 always takes the most probable token.", default=0.7, ge=0.0, le=2.0)
    top_p = Input(
        description="Sample from the most probable tokens that hold this share. 1 is off.", default=0.9, ge=0.0, le=1.0
    )
    top_k = Input(description="Sample from this many most probable tokens. 0 is off.", default=50, ge=0, le=1000)
    min_p = Input(
        description="Drop tokens less probable than this share of the best one's. 0 is off.", default=0.0, ge=0.0, le=1.0
    )
    repetition_penalty = Input(
        description="Above 1 makes tokens already seen less likely. 1 is off.", default=1.0, ge=0.1, le=2.0
    )
    stop_sequences = Input(description="Text that ends the answer and is not sent: a string or a list.", default=None)
    seed = Input(description="Same seed, same answer. Drawn and reported if not given.", default=None, ge=0, le=4294967295)
    messages = Input(description="OpenAI-style conversation that replaces prompt, pictures and system prompt.", default=None)
    pan_and_scan = Input(description="Also look at crops of pictures that are far from square.", default=False)


class Predictor(BasePredictor):
    """Serves one request at a time; more wait in Cog's 409 or in front of it."""

    slots: int | None = None  # as the recipe says

    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (weights are chosen at build time)
        """Load the model chosen at build time and answer one warm-up request."""
        # Cog returns to a client what is written here while its prediction runs. That is for the operator: the container's log.
        sys.stdout = sys.stderr = sys.__stderr__
        self.service = Service.load(source_from_environment(), slots=self.slots, only_serve=True)

    def healthcheck(self) -> bool:
        """False once the engine has stopped: the container must be replaced."""
        return self.service.alive

    @cog.streaming
    def predict(
        self,
        prompt: str = Inputs.prompt,
        image: str | None = Inputs.image,
        images: list[str] | None = Inputs.images,
        system_prompt: str = Inputs.system_prompt,
        max_new_tokens: int = Inputs.max_new_tokens,
        min_new_tokens: int = Inputs.min_new_tokens,
        temperature: float = Inputs.temperature,
        top_p: float = Inputs.top_p,
        top_k: int = Inputs.top_k,
        min_p: float = Inputs.min_p,
        repetition_penalty: float = Inputs.repetition_penalty,
        stop_sequences: str | list[str] | None = Inputs.stop_sequences,
        seed: int | None = Inputs.seed,
        messages: list[dict] | None = Inputs.messages,
        pan_and_scan: bool = Inputs.pan_and_scan,
    ) -> ConcatenateIterator[str]:  # pyright: ignore[reportInvalidTypeForm] (Cog reads this name)
        """Stream the answer, then record its metrics."""
        request = Request(
            prompt, image, images, system_prompt, max_new_tokens, min_new_tokens, temperature, top_p, top_k, min_p,
            repetition_penalty, stop_sequences, seed, messages, pan_and_scan,
        )  # fmt: skip
        yield from self.answer(request, Cancellation(), self.scope.record_metric)  # pyright: ignore[reportReturnType]

    def answer(self, request: Request, cancellation: Cancellation, record: Callable[[str, Metric], None]) -> Iterator[str]:
        """The answer in pieces; its metrics are recorded after the last one."""
        try:
            reply = self.service.stream(request, cancellation.check)
        except PredictionCancelled:
            return
        cancellation.then(reply.cancel)
        yield from reply
        for name, value in reply.metrics.items():
            record(name, value)


class ConcurrentPredictor(Predictor):
    """Serves up to 8 requests at once. `predict: "predict.py:ConcurrentPredictor"` in cog.yaml chooses it."""

    slots = 8

    @cog.streaming
    @cog.concurrent(max=8)
    async def predict(  # pyright: ignore[reportIncompatibleMethodOverride] (Cog's one form that streams side by side)
        self,
        prompt: str = Inputs.prompt,
        image: str | None = Inputs.image,
        images: list[str] | None = Inputs.images,
        system_prompt: str = Inputs.system_prompt,
        max_new_tokens: int = Inputs.max_new_tokens,
        min_new_tokens: int = Inputs.min_new_tokens,
        temperature: float = Inputs.temperature,
        top_p: float = Inputs.top_p,
        top_k: int = Inputs.top_k,
        min_p: float = Inputs.min_p,
        repetition_penalty: float = Inputs.repetition_penalty,
        stop_sequences: str | list[str] | None = Inputs.stop_sequences,
        seed: int | None = Inputs.seed,
        messages: list[dict] | None = Inputs.messages,
        pan_and_scan: bool = Inputs.pan_and_scan,
    ) -> ConcatenateIterator[str]:  # pyright: ignore[reportInvalidTypeForm] (Cog reads this name)
        """Return the stream at once; Cog reads it on a thread where the current scope may be another prediction's."""
        request = Request(
            prompt, image, images, system_prompt, max_new_tokens, min_new_tokens, temperature, top_p, top_k, min_p,
            repetition_penalty, stop_sequences, seed, messages, pan_and_scan,
        )  # fmt: skip
        return self.answer(request, watch_this_prediction(), self.scope.record_metric)  # pyright: ignore[reportReturnType]
