"""GPTQ on a given int4 grid: quantize column by column, and let the columns still ahead make up for each rounding error.

Minimizes tr((W − Q) H (W − Q)ᵀ) with H the Hessian E[xᵀx] of the inputs. Columns go in order of their importance, so that the
largest ones are rounded before errors pile up on them; grids are fixed beforehand, so groups stay groups of neighbours.
Source: Frantar et al. 2022, arXiv:2210.17323. Weights that are zero before stay zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_opt.errors import WeightsError
from gemma_opt.quantization.grid import LEVELS, Grid, stored_scale

BLOCK = 128  # columns between two updates of all the rest
DAMPING = 0.01  # share of the Hessian's mean diagonal added to it
ROUNDS = 2  # nibbles, then scales, then nibbles on those scales
_SOLVED = 2**26  # numbers, a quarter of a GB, that solving for the scales of some rows at once may take


@dataclass(frozen=True)
class Curvature:
    """What all linears that read one input share. hessian: [in, in], damped; order: of the columns, the most important first;
    upper: the Cholesky factor of the inverse, in that order.
    """

    hessian: Tensor
    order: Tensor
    upper: Tensor


def curvature(hessian: Tensor) -> Curvature:
    """Damp and factorize E[xᵀx]. Raises WeightsError where that is still not positive definite."""
    lift = DAMPING * float(hessian.diagonal().mean()) or 1.0
    damped = hessian + lift * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    order = damped.diagonal().argsort(descending=True, stable=True)
    lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
    upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(failed) or int(failed_too):
        raise WeightsError(f"the calibration Hessian of {len(hessian)} inputs is not positive definite: give more windows")
    return Curvature(damped, order, upper)


def gptq(weight: Tensor, inputs: Curvature, grid: Grid) -> tuple[Grid, Tensor]:
    """The grid with scales refitted, and nibbles [out, groups, group]. weight: float32 [out, in]."""
    rounds: list[tuple[float, Grid, Tensor]] = []
    for _ in range(ROUNDS):
        nibbles = _nibbles(weight, inputs, grid)
        grid = _refitted(weight, inputs.hessian, grid, nibbles)
        error = weight - grid.values(nibbles).flatten(1)
        rounds.append((float(((error @ inputs.hessian) * error).sum()), grid, nibbles))
    _, grid, nibbles = min(rounds, key=lambda made: made[0])
    return grid, nibbles


def _nibbles(weight: Tensor, inputs: Curvature, grid: Grid) -> Tensor:
    """One sweep over the columns. Returns float 0..15 [out, groups, group]."""
    order, upper, group = inputs.order, inputs.upper, weight.shape[1] // grid.scale.shape[1]
    moved = weight.T[order].contiguous()  # [in, out]: a column of the weight lies together, which is several times faster
    frozen, steps = moved == 0, torch.empty_like(moved)
    scale, zero = (values.T.repeat_interleave(group, dim=0)[order] for values in (grid.scale, grid.zero))
    for start in range(0, len(moved), BLOCK):
        stop = min(start + BLOCK, len(moved))
        errors = torch.empty_like(moved[start:stop])
        for column in range(start, stop):
            exact, step, middle = moved[column], scale[column], zero[column]
            nibble = (exact / step + middle).round_().clamp_(0, LEVELS - 1)
            nibble = torch.where(frozen[column], middle, nibble)
            error = (exact - (nibble - middle) * step) / upper[column, column]
            moved[column + 1 : stop].addcmul_(upper[column, column + 1 : stop, None], error, value=-1)
            steps[column], errors[column - start] = nibble, error
        moved[stop:] -= upper[start:stop, stop:].T @ errors
    found = torch.empty_like(steps)
    found[order] = steps
    return found.T.contiguous().unflatten(1, (-1, group))


def _refitted(weight: Tensor, hessian: Tensor, grid: Grid, nibbles: Tensor) -> Grid:
    """The scales of least error for these nibbles: one small linear system for each row, over its groups."""
    steps = nibbles - grid.zero[..., None]
    rows = max(1, _SOLVED // (weight.shape[1] * grid.scale.shape[1]))
    fitted = [_row_scales(*some, hessian) for some in zip(weight.split(rows), steps.split(rows), strict=True)]
    scale = torch.cat(fitted)
    good = scale.isfinite() & (scale > 0.5 * grid.scale) & (scale < 2 * grid.scale)
    return Grid(torch.where(good, stored_scale(scale), grid.scale), grid.zero)


def _row_scales(weight: Tensor, steps: Tensor, hessian: Tensor) -> Tensor:
    """weight: [rows, in]; steps: [rows, groups, group]. Returns [rows, groups]."""
    pulled = ((weight @ hessian).unflatten(1, steps.shape[1:]) * steps).sum(dim=-1)
    blocks = hessian.unflatten(1, steps.shape[1:])
    pushed = torch.einsum("kgi,rgi->rkg", blocks, steps).unflatten(1, steps.shape[1:])
    system = torch.einsum("rhi,rhig->rhg", steps, pushed)
    diagonal = system.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal.mean(dim=1, keepdim=True) + 1e-30 + (diagonal == 0)
    return torch.linalg.solve(system + torch.diag_embed(ridge), pulled)
