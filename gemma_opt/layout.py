"""Which tensors hold a weight in each stored format: their names, shapes and dtypes, and so their bytes.

The plan's arithmetic, the empty modules that a checkpoint is loaded into, and the modules that `quantize_` makes all follow
this one table. A new format registers its own `tensors` and, where not every shape will do, its `misfit`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from gemma_opt.recipe import (
    Bf16,
    Fp8,
    Fp8Dynamic,
    Fp8Static,
    Fp16,
    Fp32,
    Int4,
    Int8,
    Int8Dynamic,
    Int8DynamicInt4,
    Int8Static,
    Tied,
)

SCALE = torch.float32
_FLOATS = {Fp32: torch.float32, Bf16: torch.bfloat16, Fp16: torch.float16}


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, device: torch.device) -> Tensor:
        """An uninitialised tensor like that."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)


Layout = dict[str, TensorSpec]


@singledispatch
def tensors(stored: object, shape: tuple[int, ...]) -> Layout:
    """Name behind the module's → tensor, of one weight of that shape ([out, in] unless float). Biases are not among them."""
    raise NotImplementedError(f"layout.tensors knows no {type(stored).__name__}")


@tensors.register(Fp32)
@tensors.register(Bf16)
@tensors.register(Fp16)
def _(stored: Fp32 | Bf16 | Fp16, shape: tuple[int, ...]) -> Layout:
    return {"weight": TensorSpec(shape, float_dtype(stored))}


@tensors.register
def _(stored: Tied, shape: tuple[int, ...]) -> Layout:
    return {}


@tensors.register(Int8 | Int8Dynamic | Int8Static)
def _(stored: Int8 | Int8Dynamic | Int8Static, shape: tuple[int, ...]) -> Layout:
    return _rows(torch.int8, shape, static=isinstance(stored, Int8Static))


@tensors.register(Fp8 | Fp8Dynamic | Fp8Static)
def _(stored: Fp8 | Fp8Dynamic | Fp8Static, shape: tuple[int, ...]) -> Layout:
    return _rows(torch.float8_e4m3fn, shape, static=isinstance(stored, Fp8Static))


def _rows(dtype: torch.dtype, shape: tuple[int, ...], *, static: bool) -> Layout:
    layout = {"weight": TensorSpec(shape, dtype), "weight_scale": TensorSpec(shape[:1], SCALE)}
    return layout | {"input_scale": TensorSpec((), SCALE)} if static else layout


@tensors.register(Int4 | Int8DynamicInt4)
def _(stored: Int4 | Int8DynamicInt4, shape: tuple[int, ...]) -> Layout:
    rows, groups = shape[0], shape[1] // stored.group
    layout = {
        "weight_packed": TensorSpec((rows, shape[1] // 2), torch.uint8),
        "weight_scale": TensorSpec((rows, groups), torch.bfloat16),
    }
    return layout if stored.symmetric else layout | {"weight_zero": TensorSpec((rows, groups), torch.uint8)}


def weight_bytes(stored: object, shape: tuple[int, ...]) -> int:
    """Bytes of a weight with its scales, as stored."""
    return sum(spec.nbytes for spec in tensors(stored, shape).values())


@singledispatch
def misfit(stored: object, shape: tuple[int, ...]) -> str | None:
    """Why a linear of shape [out, in] cannot have that format; None where it can."""
    return None


@misfit.register(Int4 | Int8DynamicInt4)
def _(stored: Int4 | Int8DynamicInt4, shape: tuple[int, ...]) -> str | None:
    return f"rows of {shape[1]} do not divide into groups of {stored.group}" if shape[1] % stored.group else None


def float_dtype(stored: object) -> torch.dtype:
    """The dtype of a float format. KeyError for a quantized one."""
    return _FLOATS[type(stored)]  # type: ignore[index]
