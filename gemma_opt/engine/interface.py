"""What every engine promises, in types that hold no model: requests in, token ids out.

Texts, pictures and stop strings are not the engine's business (`prompt`, `text`, `service`): it sees token ids and
pixel tensors. The one exception is `SamplingParams.stop_sequences`, which it carries for the caller and never reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

from torch import Tensor

from gemma_opt.errors import ParameterError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Limit:
    """Closed range of one sampling parameter. predict.py repeats them as literals; a test compares."""

    low: float
    high: float


LIMITS: dict[str, Limit] = {
    "max_new_tokens": Limit(1, 8192),
    "min_new_tokens": Limit(0, 8192),
    "temperature": Limit(0.0, 2.0),
    "top_p": Limit(0.0, 1.0),
    "top_k": Limit(0, 1000),
    "min_p": Limit(0.0, 1.0),
    "repetition_penalty": Limit(0.1, 2.0),
    "seed": Limit(0, 2**32 - 1),
}
MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARACTERS = 256


@dataclass(frozen=True)
class SamplingParams:
    """Everything that changes one reply and no weight.

    temperature 0 is greedy; top_k 0 and top_p 1 are off, min_p 0 and repetition_penalty 1 too. The same seed gives the
    same reply to the same prompt. Raises ParameterError (E1005) that lists every value out of range.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_sequences: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [
            f"{name} must be {limit.low:.10g} to {limit.high:.10g}, got {value}"
            for name, limit in LIMITS.items()
            if not limit.low <= (value := getattr(self, name)) <= limit.high  # NaN is not
        ]
        if self.min_new_tokens > self.max_new_tokens:
            wrong.append(f"min_new_tokens {self.min_new_tokens} is more than max_new_tokens {self.max_new_tokens}")
        if len(self.stop_sequences) > MAX_STOP_SEQUENCES:
            wrong.append(f"at most {MAX_STOP_SEQUENCES} stop_sequences, got {len(self.stop_sequences)}")
        if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in self.stop_sequences):
            wrong.append(f"each of stop_sequences must have 1 to {MAX_STOP_CHARACTERS} characters")
        if wrong:
            raise ParameterError("; ".join(wrong))


@dataclass(frozen=True)
class EngineRequest:
    """One prompt. images: [3, side, side] float32 per picture or crop, in the order of their soft tokens."""

    token_ids: tuple[int, ...]
    images: tuple[Tensor, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)

    @cached_property
    def image_keys(self) -> tuple[bytes, ...]:
        """A digest of each picture's pixels. Takes 10 ms for a large one: worth doing on the caller's thread."""
        return tuple(hashlib.sha256(image.contiguous().numpy().data).digest() for image in self.images)


@dataclass(frozen=True)
class Finished:
    """How a generation ended. Times in seconds: until the first token (waiting included), and from first to last."""

    reason: FinishReason
    input_tokens: int
    output_tokens: int
    time_to_first_token_s: float | None
    decode_s: float

    @property
    def tokens_per_second(self) -> float | None:
        """Decode rate: tokens after the first by the time they took. None below two tokens."""
        return (self.output_tokens - 1) / self.decode_s if self.output_tokens > 1 and self.decode_s > 0 else None


class Generation(Protocol):
    """One running request; safe to use from any thread. Who lets go of it cancels it."""

    def __iter__(self) -> Iterator[int]:
        """Token ids as they come. Raises what ended the generation early, if anything did."""
        ...

    def poll(self) -> list[int]:
        """The token ids that are ready now, without waiting. Later iteration goes on after them."""
        ...

    def rest(self, seconds: float) -> None:
        """Let tokens gather: return after that time, or as soon as no further one follows."""
        ...

    def cancel(self) -> None:
        """Stop as soon as possible and free the slot. Harmless after the end."""
        ...

    @property
    def finished(self) -> Finished:
        """The summary; only after the iterator ended."""
        ...


class Engine(Protocol):
    """Runs requests in order of arrival, as many at once as it has slots."""

    def submit(self, request: EngineRequest) -> Generation:
        """Queue a request. Raises QueueFull, PromptTooLong or EngineClosed at once."""
        ...

    @property
    def alive(self) -> bool:
        """False once the engine thread has ended, on purpose or by a failure."""
        ...

    def close(self) -> None:
        """Cancel what runs, refuse what waits, and join the engine thread."""
        ...
