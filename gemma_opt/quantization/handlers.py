"""What makes a linear of each quantized format. A new format registers how it weighs and names its module; nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from functools import singledispatch

import torch
from torch import Tensor, nn

from gemma_opt import layout
from gemma_opt.errors import PlanError
from gemma_opt.policy import PlanRow, planned_weights
from gemma_opt.quantization import fit, grid
from gemma_opt.quantization.linear import Fp8Linear, Int4Linear, Int8Linear, QuantizedLinear
from gemma_opt.quantization.rows import fp8_rows, int8_rows
from gemma_opt.recipe import (
    Fp8,
    Fp8Dynamic,
    Fp8Static,
    Int4,
    Int8,
    Int8Dynamic,
    Int8DynamicInt4,
    Int8Static,
    StoredFormat,
)

Tensors = Mapping[str, Tensor]

MODULES: Mapping[type, type[QuantizedLinear]] = {
    **dict.fromkeys((Int8, Int8Dynamic, Int8Static), Int8Linear),
    **dict.fromkeys((Int4, Int8DynamicInt4), Int4Linear),
    **dict.fromkeys((Fp8, Fp8Dynamic, Fp8Static), Fp8Linear),
}
_INT4_ROWS = 2048  # rows that get their grids at once: a dozen float copies


@singledispatch
def weigh(stored: object, weight: Tensor) -> Tensors:
    """The tensors of `layout.tensors` for a float weight [out, in], by the weight alone: all but what needs data."""
    raise NotImplementedError(f"quantization.handlers.weigh knows no {type(stored).__name__}")


def linear_of(stored: StoredFormat, tensors: Tensors, bias: Tensor | None) -> QuantizedLinear:
    """The module of that format around its tensors."""
    return MODULES[type(stored)](**tensors, bias=bias, activation=stored.activation)  # type: ignore[arg-type]


def empty_linear(stored: StoredFormat, linear: nn.Linear) -> QuantizedLinear:
    """The module that a linear becomes, its tensors without values, on the linear's device."""
    specs = layout.tensors(stored, tuple(linear.weight.shape))
    tensors = {name: spec.empty(linear.weight.device) for name, spec in specs.items()}
    return linear_of(stored, tensors, bias_of(linear))


def linear_at(model: nn.Module, row: PlanRow) -> nn.Linear:
    """The float linear of a row. Raises PlanError where something else stands there."""
    module = model.get_submodule(row.name)
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{row.name}: is planned as {row.format}, and is a {type(module).__name__}, not a linear")
    return module


def round_weight_(model: nn.Module, row: PlanRow) -> None:
    """Round a float weight to its storage format; it stays in the dtype the model computes in."""
    weight, dtype = planned_weights(model, [row])[row.name], layout.float_dtype(row.format)
    if weight.dtype != dtype:
        weight.copy_(weight.to(dtype))


def bias_of(linear: nn.Linear) -> Tensor | None:
    """The bias as a plain tensor. (torch declares it as always there.)"""
    bias = dict(linear.named_parameters()).get("bias")
    return None if bias is None else bias.detach()


@weigh.register(Int8 | Int8Dynamic | Int8Static)
def _(stored: Int8 | Int8Dynamic | Int8Static, weight: Tensor) -> Tensors:
    rows, scale = int8_rows(weight)
    return {"weight": rows, "weight_scale": scale}


@weigh.register(Fp8 | Fp8Dynamic | Fp8Static)
def _(stored: Fp8 | Fp8Dynamic | Fp8Static, weight: Tensor) -> Tensors:
    rows, scale = fp8_rows(weight)
    return {"weight": rows, "weight_scale": scale}


@weigh.register(Int4 | Int8DynamicInt4)
def _(stored: Int4 | Int8DynamicInt4, weight: Tensor) -> Tensors:
    return weigh_int4(stored, weight)


def weigh_int4(stored: Int4 | Int8DynamicInt4, weight: Tensor, importance: Tensor | None = None) -> Tensors:
    """By blocks of rows. Groups that lie on a grid already (quantization-aware checkpoints) keep it.

    importance: [in], how much the square of an error counts in each column; None: all alike.
    """
    blocks = [_int4_rows(stored, rows, importance) for rows in weight.split(_INT4_ROWS)]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def _int4_rows(stored: Int4 | Int8DynamicInt4, weight: Tensor, importance: Tensor | None) -> Tensors:
    groups = grid.grouped(weight, stored.group)
    if stored.method == "rtn":
        found = grid.range_grid(groups, symmetric=stored.symmetric)
    else:
        counts = None if importance is None else importance.unflatten(0, groups.shape[1:])
        found = fit.fitted_grid(groups, symmetric=stored.symmetric, importance=counts)
    found = grid.prefer_exact(groups, found, symmetric=stored.symmetric)
    return int4_tensors(stored, found, found.nibbles(groups))


def int4_tensors(stored: Int4 | Int8DynamicInt4, found: grid.Grid, nibbles: Tensor) -> Tensors:
    """The stored tensors of nibbles [out, groups, group] on a grid."""
    tensors = {"weight_packed": grid.pack_nibbles(nibbles.flatten(1)), "weight_scale": found.scale.bfloat16()}
    return tensors if stored.symmetric else tensors | {"weight_zero": found.zero.byte()}
