"""SparseGPT: zero weights column by column, and let the columns still ahead make up for each loss at once.

Source: Frantar and Alistarh 2023, arXiv:2301.00774. Weights that are zero before stay zero, count as dropped and are
dropped first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_opt.errors import WeightsError
from gemma_opt.sparsity import masks
from gemma_opt.sparsity.quadratic import Quadratic

BLOCK = 32  # columns whose masks are chosen together; wider ones choose before the updates that change what is worth keeping


def sparsegpt(
    weight: Tensor, quadratic: Quadratic, pattern: str | tuple[int, int], count: int, row_weight: Tensor | None = None
) -> Tensor:
    """The pruned and updated weight, float32 [out, in].

    weight: float32 [out, in]; its zeros stay. pattern: "per_layer" (count: of all weights), "per_row" (count: of every row),
    or (N, M) (count unused). row_weight: [out], how much each output matters when layers choose among rows.
    Up to every column the share dropped is that of the whole, rounded down, so the count is met exactly unless more
    weights than that were zero before.
    """
    upper, failed = torch.linalg.cholesky_ex(quadratic.inverse, upper=True)
    if int(failed):
        raise WeightsError(f"the inverse Hessian of {weight.shape[1]} inputs is not positive definite: raise `damping`")
    weight, frozen = weight.clone(), weight == 0
    spent = torch.zeros(weight.shape[0] if pattern == "per_row" else 1, dtype=torch.int64, device=weight.device)
    width = BLOCK if isinstance(pattern, str) else BLOCK - BLOCK % pattern[1]
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        here = slice(start, stop)
        if isinstance(pattern, str):
            score = _scores(weight[:, here], upper[here, here], frozen[:, here], row_weight)
            due = count * stop // weight.shape[1] - spent
            keep = _keep(score, pattern, due.clamp(min=0)) & ~frozen[:, here]
            spent += (~keep).sum(dim=1) if pattern == "per_row" else (~keep).sum()
            errors = _sweep_(weight[:, here], upper[here, here], keep)
        else:
            errors = _sweep_n_m_(weight[:, here], upper[here, here], frozen[:, here], pattern)
        weight[:, stop:] -= errors @ upper[here, stop:]
    return weight


def _scores(weight: Tensor, upper: Tensor, frozen: Tensor, row_weight: Tensor | None) -> Tensor:
    """What zeroing each weight alone would cost, after the best update of the columns ahead of it."""
    score = (weight / upper.diagonal()).square()
    if row_weight is not None:
        score = score * row_weight[:, None]
    return score.masked_fill(frozen, -1.0)


def _keep(score: Tensor, pattern: str, due: Tensor) -> Tensor:
    if pattern == "per_layer":
        return masks.per_layer(score, min(int(due), score.numel()))
    order = score.argsort(dim=1, stable=True).argsort(dim=1)  # rows may differ in what they spent on earlier zeros
    return order >= due[:, None]


def _sweep_(weight: Tensor, upper: Tensor, keep: Tensor) -> Tensor:
    """Zero the columns of one block in turn, each error spread over the columns after it. Returns the errors [out, block]."""
    errors = torch.zeros_like(weight)
    for column in range(weight.shape[1]):
        _drop_(weight, upper, keep[:, column], errors, column)
    return errors


def _sweep_n_m_(weight: Tensor, upper: Tensor, frozen: Tensor, n_m: tuple[int, int]) -> Tensor:
    """The same where every group of M columns chooses its mask when its turn comes."""
    errors = torch.zeros_like(weight)
    for start in range(0, weight.shape[1], n_m[1]):
        group = slice(start, start + n_m[1])
        keep = masks.n_m(_scores(weight[:, group], upper[group, group], frozen[:, group], None), *n_m) & ~frozen[:, group]
        for offset in range(n_m[1]):
            _drop_(weight, upper, keep[:, offset], errors, start + offset)
    return errors


def _drop_(weight: Tensor, upper: Tensor, keep: Tensor, errors: Tensor, column: int) -> None:
    error = weight[:, column].masked_fill(keep, 0) / upper[column, column]
    weight[:, column:] -= error[:, None] * upper[column, column:]
    weight[:, column].masked_fill_(~keep, 0)
    errors[:, column] = error
