"""Compact removal: which MLP channels can go, and how the kept columns of down make up for them.

Channels are correlated, so their scores are not independent: the greedy choice removes the channels whose loss the others
can best make up for, then works out what the rest is worth without them (optimal brain surgeon on whole columns).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.sparsity.quadratic import Quadratic

ROUNDS = 64  # of the greedy choice: channels removed in one round are taken for independent of each other


def choose_channels(wanted: Tensor, quadratic: Quadratic, keep: int) -> Tensor:
    """Indices of the channels to keep, ascending, [keep].

    wanted: float32 [hidden, channels], the columns of down.
    A channel's cost is ‖w_j‖² / (H⁻¹)_jj with w_j its column after the removals so far; ties fall by lowest index.
    """
    columns, inverse = wanted.clone(), quadratic.inverse
    alive = torch.ones(columns.shape[1], dtype=torch.bool, device=columns.device)
    while (surplus := int(alive.sum()) - keep) > 0:
        cost = (columns.square().sum(dim=0) / inverse.diagonal()).masked_fill(~alive, torch.inf)
        here = cost.argsort(stable=True)[: max(1, min(surplus, (len(alive) - keep) // ROUNDS))]
        rows = torch.linalg.solve(inverse[here][:, here], inverse[here])
        columns -= columns[:, here] @ rows
        inverse -= inverse[:, here] @ rows
        inverse.diagonal().clamp_(min=torch.finfo(inverse.dtype).tiny)
        alive[here] = False
    return alive.nonzero().flatten()


def refit(wanted: Tensor, quadratic: Quadratic, kept: Tensor) -> Tensor:
    """The kept columns [hidden, kept] that come closest to what all columns of `wanted` give on the calibration inputs."""
    cross = quadratic.hessian[:, kept]
    factor = torch.linalg.cholesky(cross[kept])
    return torch.cholesky_solve((wanted @ cross).T, factor).T
