"""Perplexity: how surprised a model is by text it should expect. Lower is better; compare ratios, not models."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemma_opt import charts
from gemma_opt.calibration import Sample
from gemma_opt.calibration.walk import model_inputs
from gemma_opt.errors import UsageError
from gemma_opt.loading import Ready
from gemma_opt.onednn import with_onednn
from gemma_opt.prompt import PromptEncoder, single_turn

WINDOW = 512


def builtin_text() -> str:
    """English that every Python ships: the interpreter's help texts. For a first look where no file is given."""
    return "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))


def text_windows(token_ids: list[int], bos_id: int, window: int = WINDOW) -> Iterator[list[int]]:
    """Consecutive chunks of window − 1 tokens, each after `<bos>`; the last partial chunk is dropped."""
    step = window - 1
    for start in range(0, len(token_ids) - step + 1, step):
        yield [bos_id, *token_ids[start : start + step]]


def windows_of(ready: Ready, text: str, window: int = WINDOW, limit: int | None = None) -> list[list[int]]:
    """The windows of a text, tokenised without special tokens; at most `limit`. Raises UsageError if it fills none."""
    tokenizer = ready.processing.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)  # longer than a context on purpose
    windows = list(text_windows(ids, tokenizer.get_vocab()["<bos>"], window))[:limit]
    if not windows:
        raise UsageError(f"the text has {len(ids)} tokens, and one window of {window} takes {window - 1} beside <bos>")
    return windows


@dataclass(frozen=True)
class Passage:
    """Token ids of which the last `predicted` are scored, given all before them and the pictures."""

    token_ids: list[int]
    predicted: int
    images: tuple[Tensor, ...] = ()


def text_passages(ready: Ready, text: str, window: int = WINDOW, limit: int | None = None) -> list[Passage]:
    """The windows of a text, all but `<bos>` predicted. Raises UsageError if the text fills none."""
    return [Passage(chunk, len(chunk) - 1) for chunk in windows_of(ready, text, window, limit)]


def answer_passages(ready: Ready, pictures: int, seed: int) -> Iterator[Passage]:
    """The right answers to every question about unseen pictures, given picture and question."""
    encoder = PromptEncoder(ready.processing, ready.context)
    end = ready.processing.tokenizer.encode("<end_of_turn>", add_special_tokens=False)
    for index in range(pictures):
        picture = charts.draw("test", seed, index)
        for question in picture.questions:
            prompt = encoder.encode(single_turn(question.text, "", [picture.image]))
            answer = ready.processing.tokenizer.encode(question.answer, add_special_tokens=False) + end
            yield Passage([*prompt.token_ids, *answer], len(answer), prompt.images)


@torch.inference_mode()
@with_onednn
def prediction_logits(ready: Ready, passage: Passage) -> Tensor:
    """Logits [predicted, vocabulary] for the predicted tokens of a passage."""
    sample = Sample(torch.tensor([passage.token_ids]), torch.stack(passage.images) if passage.images else None)
    return ready.model(**model_inputs(ready.model, sample), logits_to_keep=passage.predicted + 1).logits[0, :-1]


def perplexity(ready: Ready, passages: Iterable[Passage]) -> float:
    """exp(total negative log likelihood / predicted tokens). At least one passage."""
    total, count = 0.0, 0
    for passage in passages:
        logits = prediction_logits(ready, passage)
        total += negative_log_likelihood(logits, targets_of(passage, logits.device))
        count += passage.predicted
    return math.exp(total / count)


def text_perplexity(ready: Ready, text: str, *, window: int = WINDOW, limit: int | None = None) -> float:
    """Perplexity of a text, tokenised without special tokens. Raises UsageError if it fills no window."""
    return perplexity(ready, text_passages(ready, text, window, limit))


def answer_perplexity(ready: Ready, pictures: int, seed: int) -> float:
    """Perplexity of the right answers to every question about unseen pictures, given picture and question."""
    return perplexity(ready, answer_passages(ready, pictures, seed))


def targets_of(passage: Passage, device: torch.device) -> Tensor:
    """The predicted tokens of a passage, [predicted]."""
    return torch.tensor(passage.token_ids[-passage.predicted :], device=device)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over positions, in nats. logits: [positions, vocabulary]; targets: [positions]."""
    return float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
