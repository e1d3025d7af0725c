"""A linear's weights as plain tensors, in the orders that kernels read; linears on one input are put on top of each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gemma_opt.quantization.grid import SYMMETRIC_ZERO, unpack_nibbles
from gemma_opt.recipe import Activation

HALVES = (128, 64, 32)  # bytes of a block of Int4Halves: as long as fits, for wide loads


@dataclass(frozen=True)
class FloatRows:
    """y = x · weightᵀ. weight: float [out, in]."""

    weight: Tensor

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Int8Rows:
    """y = (x · weightᵀ) · scale. weight: int8 [out, in]; scale: float32 [out]."""

    weight: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Fp8Rows:
    """y = (x · weightᵀ) · scale. weight: float8_e4m3fn [out, in]; scale: float32 [out]."""

    weight: Tensor
    scale: Tensor

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Int4Rows:
    """y = x · ((nibble − zero) · scale)ᵀ, a scale and a zero point for every group of neighbours in a row.

    packed: uint8 [out, in/2], the even column in the low nibble; scale: bfloat16 [out, in/group]; zero: uint8 like scale, or
    None where every zero point is 8.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.packed.shape[0]

    @property
    def group(self) -> int:
        """Neighbours that share a scale."""
        return 2 * self.packed.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        nibbles = unpack_nibbles(self.packed).view(*self.scale.shape, self.group)
        steps = nibbles.char() - (SYMMETRIC_ZERO if self.zero is None else self.zero.char()[..., None])
        return (steps * self.scale.float()[..., None]).flatten(1)


@dataclass(frozen=True)
class Int4Halves:
    """The weights of `Int4Rows` in the order that GPU kernels read: two runs of columns in the nibbles of one run of bytes.

    packed: uint8 [out, blocks · half]; of each block of 2 · half columns, byte j holds column j in its low nibble and column
    half + j in its high one. steps: int32 [groups, out], two bfloat16 numbers: 128 + zero point above the scale; that
    is a byte a group more than in a checkpoint. Columns beyond in_features, which fill the last block up, have the scale 0.
    """

    packed: Tensor
    steps: Tensor
    group: int
    half: int
    in_features: int

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.packed.shape[0]

    @staticmethod
    def of(rows: Int4Rows) -> Int4Halves:
        """Rearrange; the tensors are new."""
        group, groups = rows.group, rows.scale.shape[1]
        half = next((size for size in HALVES if size >= group and group * groups % (2 * size) == 0), group)
        missing = -groups % (2 * half // group)
        nibbles = unpack_nibbles(rows.packed)
        low, high = functional.pad(nibbles, (0, missing * group)).view(rows.out_features, -1, 2, half).unbind(2)
        zero = torch.full_like(rows.scale, SYMMETRIC_ZERO) if rows.zero is None else rows.zero.to(torch.bfloat16)
        words = torch.stack((rows.scale, zero + 128), dim=-1).view(torch.int32)[..., 0]
        steps = functional.pad(words, (0, missing)).T.contiguous()
        return Int4Halves((low | high << 4).flatten(1), steps, group, half, group * groups)

    def dequantize(self) -> Tensor:
        """The weight as float32 [out, in]."""
        numbers = self.steps.T.contiguous()[..., None].view(torch.bfloat16).float()
        blocks = self.packed.view(self.out_features, -1, self.half)
        nibbles = torch.stack((blocks & 15, blocks >> 4), dim=2).view(*numbers.shape[:2], self.group)
        weight = (nibbles + 128 - numbers[..., 1:]) * numbers[..., :1]
        return weight.flatten(1)[:, : self.in_features]


@dataclass(frozen=True)
class GridInput:
    """y = rows(steps) · scale, where steps · scale is x on the grid of an activation format; see `quantize_input`.

    input_scale: float32 [], measured once; None: a scale for each token.
    """

    rows: Int8Rows | Fp8Rows | Int4Rows | Int4Halves
    activation: Activation
    input_scale: Tensor | None

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.rows.out_features


@dataclass(frozen=True)
class LowRankRows:
    """y = left(right(x))."""

    left: PackedLinear
    right: PackedLinear

    @property
    def out_features(self) -> int:
        """Length of y."""
        return self.left.out_features


@dataclass(frozen=True)
class Stacked:
    """Linears of unlike formats on the same input, their outputs one after another."""

    parts: tuple[PackedLinear, ...]

    @property
    def out_features(self) -> int:
        """Length of y."""
        return sum(part.out_features for part in self.parts)


PackedLinear = FloatRows | Int8Rows | Fp8Rows | Int4Rows | Int4Halves | GridInput | LowRankRows | Stacked
Arrange = Callable[[PackedLinear], PackedLinear]
"""Puts a packed linear into the order that a device's kernels read."""


def as_they_are(packed: PackedLinear) -> PackedLinear:
    """The arrangement that changes nothing."""
    return packed


def pack_rows(parts: Sequence[PackedLinear]) -> PackedLinear:
    """One linear whose output is the parts' outputs one after another: one matrix if they share a format."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(_layout(part) != _layout(first) for part in parts):
        return Stacked(tuple(parts))
    if isinstance(first, GridInput):
        return replace(first, rows=pack_rows([part.rows for part in parts if isinstance(part, GridInput)]))
    tensors = [name for name, value in vars(first).items() if isinstance(value, Tensor)]
    return replace(first, **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors})


def _layout(part: PackedLinear) -> object:
    """Everything but the number of rows: parts of one layout can be put on top of each other."""
    match part:
        case LowRankRows() | Stacked():
            return id(part)
        case GridInput():
            scale = None if part.input_scale is None else float(part.input_scale)
            return part.activation, scale, _layout(part.rows)
        case _:
            fields = vars(part).values()
            return type(part), *((field.dtype, field.shape[1:]) if isinstance(field, Tensor) else field for field in fields)
