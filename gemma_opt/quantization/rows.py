"""Rows of int8 and float8 weights, one scale for each. Quantized from float32: a bfloat16 scale would carry its rounding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gemma_opt.errors import PlanError
from gemma_opt.quantization.activations import FLOOR, FP8, FP8_MAX

_PARTS = 8  # of an octave
_ROWS = 16_384  # rows that torchao quantizes at once: it needs several float copies


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's symmetric int8 rows of a weight [out, in]: int8 [out, in] and float32 scales [out], never zero."""
    made = [_int8_block(block) for block in weight.split(_ROWS)]
    return torch.cat([rows for rows, _ in made]), torch.cat([scale for _, scale in made])


def fp8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 rows of a weight [out, in], the largest of each at the format's limit: e4m3 [out, in], float32 scales [out].

    The values torchao gives, but for rows of zeros: pruning leaves such, and torchao 0.18 makes NaN of them.
    """
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp(min=FLOOR) / FP8_MAX
    return _fp8(weight, scale), scale


def fitted_fp8_rows(weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The same with that one of eight scales within an octave, for each row, that costs least.

    importance: [in], how much the square of an error counts in each column. Where weights lie between two powers of two
    decides how finely e4m3 resolves them.
    """
    weight = weight.float()
    rows, finest = fp8_rows(weight)
    scale = finest
    least = _cost(weight, rows, scale, importance)
    for part in range(1, _PARTS):
        tried = finest * 2 ** (part / _PARTS)
        candidate = _fp8(weight, tried)
        cost = _cost(weight, candidate, tried, importance)
        better = cost < least
        rows, scale = torch.where(better[:, None], candidate.float(), rows.float()).to(FP8), torch.where(better, tried, scale)
        least = torch.where(better, cost, least)
    return rows, scale


def _fp8(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _cost(weight: Tensor, rows: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """[out]."""
    return (rows.float() * scale[:, None] - weight).square() @ importance


def _int8_block(block: Tensor) -> tuple[Tensor, Tensor]:
    # Imported here: it takes a second, and logs about extension libraries this package does not use.
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

    with torch.device("meta"):
        scratch = nn.Linear(block.shape[1], block.shape[0], bias=False)
    scratch.weight = nn.Parameter(block.float(), requires_grad=False)
    quantize_(scratch, Int8WeightOnlyConfig(set_inductor_config=False))  # else torchao changes them for the whole process
    made = scratch.weight
    if not isinstance(made, Int8Tensor):
        raise PlanError(f"torchao left a weight of {block.shape[1]} columns as it was")
    return made.qdata, made.scale.reshape(-1).float()
