"""The Cog predictor: inputs in, streamed text out. Everything else is `gemma_opt.service`.

Cog reads this file's signature without running it, so every limit is a literal here; tests/test_openapi.py compares
them with the library's. Images are declared as strings on purpose: for a Path, Cog itself would download any URL,
private addresses included (README, "Limits").
"""

import logging
import sys

import cog
from cog import BasePredictor, ConcatenateIterator, Input

from gemma_opt.loading import source_from_environment
from gemma_opt.service import Request, Service


class Predictor(BasePredictor):
    """Serves one request at a time; more wait in Cog's 409 or in front of it."""

    def setup(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (weights are chosen at build time)
        """Load the model chosen at build time and answer one warm-up request."""
        # Cog returns to a client what is written here while its prediction runs. That is for the operator: the container's log.
        sys.stdout = sys.stderr = sys.__stderr__
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        self.service = Service.load(source_from_environment())

    def healthcheck(self) -> bool:
        """False once the engine has stopped: the container must be replaced."""
        return self.service.alive

    @cog.streaming
    def predict(
        self,
        prompt: str = Input(description="What to ask. Required unless messages are given.", default=""),
        image: str | None = Input(
            description="Picture to ask about: a data URI or an http(s) URL (PNG, JPEG, WEBP, GIF).", default=None
        ),
        images: list[str] | None = Input(description="More pictures, after image, in this order.", default=None),
        system_prompt: str = Input(description="Instruction that precedes the prompt.", default="You are a helpful assistant."),
        max_new_tokens: int = Input(description="Longest answer, in tokens.", default=512, ge=1, le=8192),
        min_new_tokens: int = Input(
            description="Shortest answer, in tokens: until then the model cannot stop.", default=0, ge=0, le=8192
        ),
        temperature: float = Input(
            description="Randomness. 0 always takes the most probable token.", default=0.7, ge=0.0, le=2.0
        ),
        top_p: float = Input(
            description="Sample from the most probable tokens that hold this share. 1 is off.", default=0.9, ge=0.0, le=1.0
        ),
        top_k: int = Input(description="Sample from this many most probable tokens. 0 is off.", default=50, ge=0, le=1000),
        min_p: float = Input(
            description="Drop tokens less probable than this share of the best one's. 0 is off.", default=0.0, ge=0.0, le=1.0
        ),
        repetition_penalty: float = Input(
            description="Above 1 makes tokens already seen less likely. 1 is off.", default=1.0, ge=0.1, le=2.0
        ),
        stop_sequences: str | list[str] | None = Input(
            description="Text that ends the answer and is not sent: a string or a list.", default=None
        ),
        seed: int | None = Input(
            description="Same seed, same answer. Drawn and reported if not given.", default=None, ge=0, le=4294967295
        ),
        messages: list[dict] | None = Input(
            description="OpenAI-style conversation that replaces prompt, pictures and system prompt.", default=None
        ),
        pan_and_scan: bool = Input(description="Also look at crops of pictures that are far from square.", default=False),
    ) -> ConcatenateIterator[str]:  # pyright: ignore[reportInvalidTypeForm] (Cog reads this name)
        """Stream the answer, then record its metrics."""
        reply = self.service.stream(
            Request(
                prompt=prompt,
                image=image,
                images=images,
                system_prompt=system_prompt,
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                stop_sequences=stop_sequences,
                seed=seed,
                messages=messages,
                pan_and_scan=pan_and_scan,
            )
        )
        yield from reply  # pyright: ignore[reportReturnType]
        for name, value in reply.metrics.items():
            self.record_metric(name, value)
