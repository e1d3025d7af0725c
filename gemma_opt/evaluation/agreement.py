"""How far a compressed model strays from its reference, token by token: KL divergence, top-1 agreement, greedy prefixes.

Finer than perplexity: two models with equal perplexity can give different answers. Both models are in memory, and logits
of one passage at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile

import torch
from torch import Tensor

from gemma_opt import charts
from gemma_opt.engine.interface import SamplingParams
from gemma_opt.errors import UsageError
from gemma_opt.evaluation.perplexity import (
    WINDOW,
    Passage,
    negative_log_likelihood,
    prediction_logits,
    targets_of,
    text_passages,
    windows_of,
)
from gemma_opt.loading import Ready
from gemma_opt.prompt import EncodedPrompt, single_turn
from gemma_opt.service import Service

PROMPT_TOKENS = 64
GREEDY_TOKENS = 32
ROWS = 128  # positions whose probabilities are compared at once: a 262,144-wide float32 row is 1 MB, and KL needs four
END = -1  # stands for the end of a reply, which counts as a token to agree on


@dataclass(frozen=True)
class Agreement:
    """Over all predicted tokens of a text. kl: mean KL(reference ‖ model), nats a token. top1: share of equal best tokens."""

    tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    top1: float

    @property
    def ratio(self) -> float:
        """Perplexity as a multiple of the reference's."""
        return self.perplexity / self.reference_perplexity

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class PrefixMatch:
    """Greedy replies of two models to the same prompts, compared until they first differ.

    tokens: mean number of equal tokens; share: of all the reference's tokens; identical: share of prompts with equal replies.
    """

    prompts: int
    tokens: float
    share: float
    identical: float

    def to_json(self) -> dict[str, object]:
        """Plain dictionary for JSON."""
        return asdict(self)


def text_agreement(reference: Ready, model: Ready, text: str, *, window: int = WINDOW, limit: int | None = None) -> Agreement:
    """`agreement` over the windows of a text. Raises UsageError if the text fills none."""
    return agreement(reference, model, text_passages(model, text, window, limit))


@torch.inference_mode()
def agreement(reference: Ready, model: Ready, passages: Iterable[Passage]) -> Agreement:
    """Compare next-token distributions over at least one passage. Raises UsageError if the vocabularies differ."""
    refuse_other_vocabulary(reference, model)
    tokens, kl, same, surprise, expected_surprise = 0, 0.0, 0, 0.0, 0.0
    for passage in passages:
        expected, got = (prediction_logits(ready, passage) for ready in (reference, model))
        for rows, other, right in zip(
            expected.split(ROWS),
            got.to(expected.device).split(ROWS),
            targets_of(passage, expected.device).split(ROWS),
            strict=True,
        ):
            kl += float(kl_divergence(rows, other).sum(dtype=torch.float64))
            same += int((rows.argmax(-1) == other.argmax(-1)).sum())
            surprise += negative_log_likelihood(other, right)
            expected_surprise += negative_log_likelihood(rows, right)
        tokens += passage.predicted
    return Agreement(tokens, math.exp(surprise / tokens), math.exp(expected_surprise / tokens), kl / tokens, same / tokens)


def kl_divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference ‖ model) of the softmax distributions of two [rows, vocabulary] logits. Returns [rows], float32, in nats."""
    expected = torch.log_softmax(reference.float(), dim=-1)
    return (expected.exp() * (expected - torch.log_softmax(model.float(), dim=-1))).sum(dim=-1)


def greedy_agreement(
    reference: Service, model: Service, prompts: Sequence[EncodedPrompt], progress: Callable[[int, int], None] | None = None
) -> PrefixMatch:
    """Let both models answer greedily, at most GREEDY_TOKENS each, and compare. Raises UsageError if there is no prompt."""
    if not prompts:
        raise UsageError("nothing to compare: there is no prompt")
    refuse_other_vocabulary(reference.ready, model.ready)
    pairs = list[tuple[list[int], list[int]]]()
    for done, prompt in enumerate(prompts, start=1):
        pairs.append((_reply(reference, prompt), _reply(model, prompt)))
        if progress:
            progress(done, len(prompts))
    return prefix_match(pairs)


def prefix_match(pairs: Sequence[tuple[list[int], list[int]]]) -> PrefixMatch:
    """Summarise pairs of (reference's, model's) replies, each ended by END if it stopped by itself."""
    equal = [sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))) for one, other in pairs]
    total = sum(len(one) for one, _ in pairs)
    return PrefixMatch(
        prompts=len(pairs),
        tokens=sum(equal) / len(pairs),
        share=sum(equal) / total if total else 1.0,
        identical=sum(one == other for one, other in pairs) / len(pairs),
    )


def text_prompts(ready: Ready, text: str, count: int, window: int = WINDOW) -> list[EncodedPrompt]:
    """The first PROMPT_TOKENS tokens of `count` windows spread evenly over a text (of all, if it has fewer)."""
    if not count:
        return []
    windows = windows_of(ready, text, window, None)
    picked = windows[:: max(1, len(windows) // count)][:count]
    return [EncodedPrompt(tuple(chunk[:PROMPT_TOKENS]), (), 0) for chunk in picked]


def chart_prompts(service: Service, count: int, seed: int) -> list[EncodedPrompt]:
    """`count` unseen pictures with the request to describe them; none for a text-only model."""
    if service.ready.processing.processor is None:
        return []
    pictures = (charts.draw("test", seed, index) for index in range(count))
    return [service.encode(single_turn("Describe the picture.", "", [picture.image])) for picture in pictures]


def _reply(service: Service, prompt: EncodedPrompt) -> list[int]:
    generation = service.generate(prompt, SamplingParams(max_new_tokens=GREEDY_TOKENS, temperature=0))
    tokens = list(generation)
    return [*tokens, END] if generation.finished.reason == "stop" else tokens


def refuse_other_vocabulary(reference: Ready, model: Ready) -> None:
    """Raises UsageError where the models' tokens are not the same."""
    one, other = (ready.model.config.get_text_config().vocab_size for ready in (reference, model))
    probe = "Ünïcode, 3.14 and plain words: the same tokens?"
    tokens = [ready.processing.tokenizer.encode(probe) for ready in (reference, model)]
    if one != other or tokens[0] != tokens[1]:
        raise UsageError(f"the reference has another vocabulary ({one:,} and {other:,} tokens): nothing can be compared")
