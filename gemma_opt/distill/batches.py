"""Which windows a step sees, and how they become one batch.

The order is a pure function of seed and step, so a training that goes on after a kill sees what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_opt.calibration import Sample


@dataclass(frozen=True)
class Batch:
    """Windows as one set of model inputs, padded on the right, where causal attention lets no real token look.

    windows: their numbers; counted: bool [windows, length], the positions whose prediction is learned.
    """

    windows: tuple[int, ...]
    inputs: dict[str, Tensor]
    counted: Tensor


def windows_of_step(step: int, batch: int, windows: int, seed: int) -> list[int]:
    """The numbers of the windows that a step sees; every window is seen once before one is seen again."""
    first = step * batch
    return [_shuffled(index // windows, windows, seed)[index % windows] for index in range(first, first + batch)]


def counted_positions(sample: Sample, image_token: int) -> Tensor:
    """bool [tokens]: where the next token is worth learning.

    The answer and the end after it, where the sample has an answer; else every position that is not a picture's.
    """
    ids = sample.token_ids[0]
    if sample.answer_tokens is None:
        return ids != image_token
    return torch.arange(len(ids)) >= len(ids) - 1 - sample.answer_tokens


def collate(samples: Sequence[Sample], windows: Sequence[int], image_token: int, like: Tensor) -> Batch:
    """The chosen samples as one batch on the device of `like`, pictures in its dtype."""
    chosen = [samples[window] for window in windows]
    length = max(sample.token_ids.shape[1] for sample in chosen)
    ids = torch.zeros(len(chosen), length, dtype=torch.long)
    counted = torch.zeros(len(chosen), length, dtype=torch.bool)
    for row, sample in enumerate(chosen):
        tokens = sample.token_ids.shape[1]
        ids[row, :tokens] = sample.token_ids[0]
        counted[row, :tokens] = counted_positions(sample, image_token)
    inputs = {"input_ids": ids.to(like.device)}
    pictures = [sample.images for sample in chosen if sample.images is not None]
    if pictures:
        inputs["pixel_values"] = torch.cat(pictures).to(like.device, like.dtype)
        inputs["token_type_ids"] = (ids == image_token).long().to(like.device)
    return Batch(tuple(windows), inputs, counted.to(like.device))


def _shuffled(epoch: int, windows: int, seed: int) -> list[int]:
    order = list(range(windows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order
