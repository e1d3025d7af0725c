"""Quantization-aware training: every product with a weight uses the weight as it will be stored.

The float weight is what is trained; its gradient is that of the rounded one (straight-through estimator, Bengio et al. 2013,
arXiv:1308.3432). Rounding is the quantizer's own, so the trained model and the quantized one have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gemma_opt.errors import PlanError

Rounding = Callable[[Tensor], Tensor]  # a float weight [out, in] → float32 [out, in] as stored


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _RoundedForward:
    """A linear's forward with its weight rounded."""

    def __init__(self, linear: nn.Linear, rounding: Rounding) -> None:
        self._linear = linear
        self._rounding = rounding
        self._rounded: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._linear.weight
        if self._rounded is None:
            self._rounded = self._rounding(weight.detach())
        return functional.linear(x, _StraightThrough.apply(weight, self._rounded), self._linear.bias)

    def forget(self) -> None:
        """The weight has changed. (A fused optimizer does not count its changes in the tensor's version.)"""
        self._rounded = None


@contextmanager
def rounded(model: nn.Module, roundings: Mapping[str, Rounding]) -> Generator[Callable[[], None]]:
    """Let the named linears of a model compute with rounded weights. Gives what must be called after weights have changed.

    Raises PlanError where one is no linear.
    """
    linears: list[nn.Linear] = []
    for name in roundings:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise PlanError(f"{name}: is to be trained behind its rounding, and is a {type(module).__name__}, not a linear")
        linears.append(module)
    forwards = [_RoundedForward(linear, rounding) for linear, rounding in zip(linears, roundings.values(), strict=True)]

    def forget() -> None:
        for forward in forwards:
            forward.forget()

    for linear, forward in zip(linears, forwards, strict=True):
        setattr(linear, "forward", forward)  # noqa: B010 (the type checker knows one forward)
    try:
        yield forget
    finally:
        for linear in linears:
            del linear.forward
