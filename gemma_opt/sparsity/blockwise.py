"""Block-wise fine-tuning: all kept weights of a decoder layer together learn what the dense layer gave.

Pruning fits one linear at a time to what it gave itself. Together they can make up for far more: gate and up for what down
lost, one head for another. A layer is trained on the inputs it gets behind the pruned layers before it, against what its
dense self makes of the same inputs, so that it needs no second model. Source: Guo et al. 2024, arXiv:2402.12419.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemma_opt.calibration import Block
from gemma_opt.onednn import with_onednn

BATCH = 2  # samples a step
RATE = 5e-4  # Adam's peak rate, of a weight's root mean square: matrices of any size move alike
BETAS = (0.9, 0.98)  # tens to hundreds of steps are too few for the usual memory of 1,000
WARM_UP = 0.1  # of all steps


@torch.no_grad()
@with_onednn
def outputs(block: Block, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """What the layer gives for every sample with these weights: float32 [1, tokens, hidden] each."""
    return [block.output(index, weights) for index in range(len(block))]


@with_onednn
def fit_block(block: Block, weights: Mapping[str, Tensor], wanted: Sequence[Tensor], epochs: int) -> dict[str, Tensor]:
    """The weights after that many passes over the samples, float32; zeros stay zero. As they were where that is no gain.

    weights: by the linears' names, float32. wanted: the layer's output for every sample, as from `outputs`.
    """
    before = _error(block, weights, wanted)
    if not before:
        return dict(weights)
    trained = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    kept = {name: weight != 0 for name, weight in weights.items()}
    peaks = [RATE * _rms(weight) for weight in weights.values()]
    groups = [{"params": [weight], "lr": peak} for weight, peak in zip(trained.values(), peaks, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    batches = [batch for epoch in range(epochs) for batch in _batches(len(block), epoch)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=len(batches), pct_start=WARM_UP, cycle_momentum=False
    )
    for batch in batches:
        with torch.enable_grad():
            errors = [(block.output(index, trained) - wanted[index]).square().mean() for index in batch]
            loss = torch.stack(errors).mean() / before
        gradients = torch.autograd.grad(loss, list(trained.values()))
        for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
            weight.grad = gradient * kept[name]
        optimizer.step()
        schedule.step()
    found = {name: weight.detach() for name, weight in trained.items()}
    return found if _error(block, found, wanted) < before else dict(weights)


@torch.no_grad()
def _error(block: Block, weights: Mapping[str, Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean over the samples of the mean squared error."""
    errors = [(block.output(index, weights) - target).square().mean() for index, target in enumerate(wanted)]
    return float(torch.stack(errors).mean())


def _rms(weight: Tensor) -> float:
    """Root mean square of what is not zero."""
    return float((weight.square().sum() / weight.count_nonzero().clamp(min=1)).sqrt())


def _batches(samples: int, epoch: int) -> list[list[int]]:
    """All samples in an order of the epoch's own, BATCH at a time."""
    order: list[int] = torch.randperm(samples, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[at : at + BATCH] for at in range(0, samples, BATCH)]
