"""Float32 matrix products on the CPU through oneDNN instead of MKL.

torch sends float32 linears to MKL, whose kernels reach half of oneDNN's speed on AMD processors (measured on one Zen 5 core:
105 against 230 GFLOP/s). Calibration and evaluation are nothing but such products. The results differ in rounding only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_P = ParamSpec("_P")
_R = TypeVar("_R")


class OneDnnLinears(TorchFunctionMode):
    """While active on this thread, `functional.linear` without bias on float32 CPU tensors runs in oneDNN, backward too.

    With a bias it does where no gradients are wanted.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Called by torch for every function; all but the linears pass through."""
        if func is functional.linear and not kwargs:
            x, weight, *rest = args
            bias = rest[0] if rest else None
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and _suits(x) and _suits(weight):
                if not torch.is_grad_enabled():
                    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
                if bias is None:
                    return _Linear.apply(x, weight)
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    """x · weightᵀ with three oneDNN products instead of MKL's."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return (
            torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), weight.T.contiguous(), None, "none", [], "")
            if of_x
            else None,
            product(gradient.flatten(0, -2), x.flatten(0, -2)) if of_weight else None,
        )


def with_onednn(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function with `OneDnnLinears` active."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with OneDnnLinears():
            return function(*args, **kwargs)

    return run


def product(one: Tensor, other: Tensor) -> Tensor:
    """oneᵀ · other of float32 [rows, m] and [rows, n]; returns [m, n]."""
    if _suits(one):
        return torch.ops.mkldnn._linear_pointwise(one.T.contiguous(), other.T.contiguous(), None, "none", [], "")
    return one.T @ other


def _suits(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.backends.mkldnn.is_available()
