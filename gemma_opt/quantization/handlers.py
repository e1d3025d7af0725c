"""What makes a linear of each quantized format. A new format registers how it weighs and names its module; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn

from gemma_opt import layout
from gemma_opt.errors import PlanError
from gemma_opt.quantization import grid
from gemma_opt.quantization.linear import Int4Linear, Int8Linear, QuantizedLinear
from gemma_opt.recipe import Int4, Int8, StoredFormat

Tensors = Mapping[str, Tensor]

MODULES: Mapping[type, type[QuantizedLinear]] = {Int8: Int8Linear, Int4: Int4Linear}
_ROWS = 16_384  # rows that torchao quantizes at once: it needs several float copies


@singledispatch
def weigh(stored: object, weight: Tensor) -> Tensors:
    """The tensors of `layout.tensors` for a float weight [out, in], by the weight alone."""
    raise NotImplementedError(f"quantization.handlers.weigh knows no {type(stored).__name__}")


def linear_of(stored: StoredFormat, tensors: Tensors, bias: Tensor | None) -> QuantizedLinear:
    """The module of that format around its tensors."""
    return MODULES[type(stored)](**tensors, bias=bias)  # type: ignore[arg-type]


def empty_linear(stored: StoredFormat, linear: nn.Linear) -> QuantizedLinear:
    """The module that a linear becomes, its tensors without values, on the linear's device."""
    specs = layout.tensors(stored, tuple(linear.weight.shape))
    tensors = {name: spec.empty(linear.weight.device) for name, spec in specs.items()}
    return linear_of(stored, tensors, bias_of(linear))


def bias_of(linear: nn.Linear) -> Tensor | None:
    """The bias as a plain tensor. (torch declares it as always there.)"""
    bias = dict(linear.named_parameters()).get("bias")
    return None if bias is None else bias.detach()


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's symmetric int8 rows of a weight [out, in]: int8 [out, in] and float32 scales [out], never zero.

    Quantized from float32, or the scales of a bfloat16 weight would carry its rounding; a block of rows at a time, since
    torchao needs several float copies.
    """
    # Imported here: it takes a second, and logs about extension libraries this package does not use.
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    def block_rows(block: Tensor) -> tuple[Tensor, Tensor]:
        with torch.device("meta"):
            scratch = nn.Linear(block.shape[1], block.shape[0], bias=False)
        scratch.weight = nn.Parameter(block.float(), requires_grad=False)
        # torchao would otherwise change inductor's settings for the whole process.
        torchao_quantize_(scratch, Int8WeightOnlyConfig(set_inductor_config=False))
        rows = scratch.weight
        if not isinstance(rows, Int8Tensor):
            raise PlanError(f"torchao left a weight of shape {list(weight.shape)} as it was")
        return rows.qdata, rows.scale.reshape(-1).float()

    blocks = [block_rows(block) for block in weight.split(_ROWS)]
    return torch.cat([rows for rows, _ in blocks]), torch.cat([scale for _, scale in blocks])


@weigh.register
def _(stored: Int8, weight: Tensor) -> Tensors:
    rows, scale = int8_rows(weight)
    return {"weight": rows, "weight_scale": scale}


@weigh.register
def _(stored: Int4, weight: Tensor) -> Tensors:
    groups = grid.grouped(weight, stored.group)
    found = grid.range_grid(groups, symmetric=stored.symmetric)
    return int4_tensors(stored, found, found.nibbles(groups))


def int4_tensors(stored: Int4, found: grid.Grid, nibbles: Tensor) -> Tensors:
    """The stored tensors of nibbles [out, groups, group] on a grid."""
    tensors = {"weight_packed": grid.pack_nibbles(nibbles.flatten(1)), "weight_scale": found.scale.bfloat16()}
    return tensors if stored.symmetric else tensors | {"weight_zero": found.zero.byte()}
