"""Least squares on one linear: the error of a changed weight W is tr((W − T) H (W − T)ᵀ), with T what it should be.

H is the damped Hessian E[xᵀx] of the inputs x the layer receives now. T is the dense weight; or, to make up for earlier
layers as well, the least-squares fit of the dense layer's output on the dense model's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.calibration import Moments
from gemma_opt.errors import WeightsError
from gemma_opt.onednn import with_onednn


@dataclass(frozen=True)
class Spectrum:
    """A Hessian D C D with C of diagonal 1. scale: [in], the diagonal of D; values: [in] and vectors: [in, in] are C's."""

    scale: Tensor
    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class Quadratic:
    """hessian: [in, in], damped, positive definite; factor: its lower Cholesky factor. Both float32."""

    hessian: Tensor
    factor: Tensor

    @property
    def inverse(self) -> Tensor:
        """[in, in]."""
        return torch.cholesky_inverse(self.factor)

    @cached_property
    def spectrum(self) -> Spectrum:
        """Found once for all linears that read the same input."""
        scale = self.hessian.diagonal().sqrt()
        return Spectrum(scale, *torch.linalg.eigh(self.hessian / scale / scale[:, None]))


def damped(hessian: Tensor, damping: float) -> Quadratic:
    """Add `damping` times the mean diagonal to the diagonal. Inputs that are never used count as if they were.

    Raises WeightsError where that is still not positive definite.
    """
    diagonal = hessian.diagonal()
    lift = damping * float(diagonal.mean()) or 1.0
    matrix = hessian + lift * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise WeightsError(f"the calibration Hessian of {len(hessian)} inputs is not positive definite: raise `damping`")
    return Quadratic(matrix, factor)


def target(weight: Tensor, moments: Moments, quadratic: Quadratic) -> Tensor:
    """T of the module docstring, float32 [out, in]: the weight itself, or refitted where cross moments are given.

    Ridge towards the weight: min ‖T x − W x₀‖² + lift · ‖T − W‖², with the lift of the damping.
    """
    weight = weight.detach().float()
    if moments.cross is None or moments.hessian is None:
        return weight
    pull = weight @ (moments.cross + (quadratic.hessian - moments.hessian))
    return torch.cholesky_solve(pull.T, quadratic.factor).T


@with_onednn
def refine(weight: Tensor, keep: Tensor, wanted: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Move the kept weights towards the least error, the others staying zero: conjugate gradients, all rows at once.

    weight, wanted: float32 [out, in]; keep: bool [out, in]; hessian: [in, in], positive definite. Returns [out, in].
    """
    scale = 1 / hessian.diagonal()
    weight = weight * keep
    residual = functional.linear(wanted - weight, hessian) * keep
    ahead = residual * scale
    direction, power = ahead, (residual * ahead).sum(dim=1, keepdim=True)
    for _ in range(steps):
        pushed = functional.linear(direction, hessian) * keep
        curvature = (direction * pushed).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, power / curvature, 0.0)
        weight = weight + step * direction
        residual = residual - step * pushed
        ahead = residual * scale
        power, before = (residual * ahead).sum(dim=1, keepdim=True), power
        direction = ahead + torch.where(before > 0, power / before, 0.0) * direction
    return weight
