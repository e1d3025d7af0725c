"""Perplexity: how surprised a model is by text it should expect. Lower is better; compare ratios, not models."""

from __future__ import annotations

import math
import pydoc_data.topics
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gemma_opt import charts
from gemma_opt.errors import UsageError
from gemma_opt.loading import Ready
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
    ids = tokenizer.encode(text, add_special_tokens=False)
    windows = list(text_windows(ids, tokenizer.bos_token_id, window))[:limit]
    if not windows:
        raise UsageError(f"the text has {len(ids)} tokens, fewer than one window of {window - 1}")
    return windows


@torch.inference_mode()
def text_perplexity(ready: Ready, text: str, *, window: int = WINDOW, limit: int | None = None) -> float:
    """exp(total negative log likelihood / predicted tokens) over a text, tokenised without special tokens.

    limit: at most that many windows. Raises UsageError if the text fills no window.
    """
    windows = windows_of(ready, text, window, limit)
    device = ready.model.get_input_embeddings().weight.device
    total = 0.0
    for chunk in windows:
        tokens = torch.tensor([chunk], device=device)
        total += negative_log_likelihood(ready.model(tokens).logits[0, :-1], tokens[0, 1:])
    return math.exp(total / (len(windows) * (window - 1)))


@torch.inference_mode()
def answer_perplexity(ready: Ready, pictures: int, seed: int) -> float:
    """Perplexity of the right answers to every question about unseen pictures, given picture and question."""
    encoder = PromptEncoder(ready.processing, ready.context)
    end = ready.processing.tokenizer.encode("<end_of_turn>", add_special_tokens=False)
    device = ready.model.get_input_embeddings().weight.device
    image_token = ready.model.config.image_token_id
    total, count = 0.0, 0
    for index in range(pictures):
        picture = charts.draw("test", seed, index)
        for question in picture.questions:
            prompt = encoder.encode(single_turn(question.text, "", [picture.image]))
            answer = ready.processing.tokenizer.encode(question.answer, add_special_tokens=False) + end
            ids = torch.tensor([[*prompt.token_ids, *answer]], device=device)
            pixels = torch.stack(prompt.images).to(device, ready.model.dtype)
            output = ready.model(
                ids, pixel_values=pixels, token_type_ids=(ids == image_token).long(), logits_to_keep=len(answer) + 1
            )
            total += negative_log_likelihood(output.logits[0, :-1], ids[0, -len(answer) :])
            count += len(answer)
    return math.exp(total / count)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """Sum over positions, in nats. logits: [positions, vocabulary]; targets: [positions]."""
    return float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
