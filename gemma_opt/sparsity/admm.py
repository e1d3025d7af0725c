"""ADMM: two copies of the weights, one that fits the layer's outputs and one that has the zeros, pulled ever closer together.

Unlike SparseGPT, which decides column by column and for good, every weight may come back until the end, so the mask is
chosen with the updates of all the others in view. The pull grows by a constant factor a step; in the Hessian's eigenvectors
each step is two products, whatever the pull. Sources: Boyd et al. 2011, doi:10.1561/2200000016; for pruning with a growing
pull Meng et al. 2024, arXiv:2406.07831.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.onednn import with_onednn
from gemma_opt.sparsity.quadratic import Quadratic

FIRST_PULL, LAST_PULL = 0.03, 10.0  # of a Hessian whose diagonal is 1: by the last the two copies are the same, nearly


@with_onednn
def admm(
    weight: Tensor,
    quadratic: Quadratic,
    keep_of: Callable[[Tensor], Tensor],
    steps: int,
    row_weight: Tensor | None = None,
) -> Tensor:
    """The pruned and updated weight, float32 [out, in].

    weight: float32 [out, in]; its zeros stay. keep_of: scores [out, in], those of zeros −1 → bool [out, in], True survives.
    row_weight: [out], how much each output matters where rows compete.
    """
    spectrum = quadratic.spectrum
    scale, values = spectrum.scale, spectrum.values
    rows, columns = spectrum.vectors.T.contiguous(), spectrum.vectors.contiguous()
    frozen, weight = weight == 0, weight * scale
    pulled = functional.linear(weight, rows) * values
    growth = (LAST_PULL / FIRST_PULL) ** (1 / max(1, steps - 1))
    pull, drift = FIRST_PULL, torch.zeros_like(weight)

    def project(given: Tensor) -> Tensor:
        score = given.abs() if row_weight is None else given.abs() * row_weight.sqrt()[:, None]
        return given * (keep_of(score.masked_fill(frozen, -1.0)) & ~frozen)

    sparse = project(weight)
    for _ in range(steps):
        fitting = functional.linear((pulled + pull * functional.linear(sparse - drift, rows)) / (values + pull), columns)
        sparse = project(fitting + drift)
        drift = (drift + fitting - sparse) / growth
        pull *= growth
    return sparse / scale
