"""Even out the channels of a linear's input without changing what the model computes: divide them, and multiply the weights.

Large channels spoil a scale that all share. Each is divided by s where it is made, and the columns that read it are multiplied
by s: exact in real numbers, free at run time. Every input of a Gemma 3 layer has a place that can be divided: norms for
attention and MLP inputs, value rows for the output projection, up rows for down. Source: Xiao et al. 2022, arXiv:2211.10438.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from gemma_opt.policy import Role, role_of

_LIMIT = 1e4  # of factors: a channel that is never used asks for any


def factors(input_peaks: Tensor, weight_peaks: Tensor, alpha: float) -> Tensor:
    """s of every channel: input_peaks^alpha / weight_peaks^(1 − alpha), scaled to a geometric mean of 1. All [in]."""
    used = (input_peaks > 0) & (weight_peaks > 0)
    found = torch.where(used, input_peaks.clamp(min=1e-20) ** alpha / weight_peaks.clamp(min=1e-20) ** (1 - alpha), 1.0)
    middle = found[used].log().mean().exp() if bool(used.any()) else found.new_ones(())
    return torch.where(used, (found / middle).clamp(1 / _LIMIT, _LIMIT), 1.0)


@torch.no_grad()
def smooth_(layer: nn.Module, readers: dict[str, nn.Linear], input_peaks: Tensor, alpha: float) -> None:
    """Move a share of the input's unevenness into the linears that read it. readers: all of them, by name, of one step.

    The change is exact up to rounding: where a norm's weight rounds, the columns take the factor that it really applies.
    """
    first = role_of(next(iter(readers)))
    weight_peaks = torch.stack([linear.weight.abs().amax(dim=0).float() for linear in readers.values()]).amax(dim=0)
    if first is Role.OUTPUT:
        applied = _divide_values_(layer, input_peaks, weight_peaks, alpha)
    elif first is Role.DOWN:
        applied = _divide_rows_(_linear(layer, "mlp.up_proj"), factors(input_peaks, weight_peaks, alpha))
    else:
        name = "input_layernorm" if first is Role.QUERY else "pre_feedforward_layernorm"
        applied = _divide_norm_(layer.get_submodule(name), factors(input_peaks, weight_peaks, alpha))
    for linear in readers.values():
        linear.weight.copy_(linear.weight.float() * applied)


def _divide_norm_(norm: nn.Module, wanted: Tensor) -> Tensor:
    """Gemma's norms multiply by 1 + weight. Returns the factors that the rounded weight applies."""
    weight = cast(nn.Parameter, norm.weight)
    before = 1 + weight.float()
    weight.copy_(before / wanted - 1)
    after = 1 + weight.float()
    applied = before / after
    usable = applied.isfinite() & (applied > 0)
    weight.copy_(torch.where(usable, weight.float(), before - 1))
    return torch.where(usable, applied, 1.0)


def _divide_rows_(linear: nn.Linear, wanted: Tensor) -> Tensor:
    linear.weight.copy_(linear.weight.float() / wanted[:, None])
    return wanted


def _divide_values_(layer: nn.Module, input_peaks: Tensor, weight_peaks: Tensor, alpha: float) -> Tensor:
    """Query heads of one group read the same value rows: they share factors, found from the largest of them."""
    values = _linear(layer, "self_attn.v_proj")
    width = cast(int, cast(nn.Module, layer.self_attn).head_dim)
    heads = len(input_peaks) // values.out_features
    shape = (values.out_features // width, heads, width)  # key-value heads, query heads of each, channels
    input_peaks, weight_peaks = (peaks.view(shape).amax(dim=1).flatten() for peaks in (input_peaks, weight_peaks))
    shared = factors(input_peaks, weight_peaks, alpha)
    _divide_rows_(values, shared)
    return shared.view(shape[0], 1, width).expand(shape[0], heads, width).flatten()


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    """The linear whose rows make an input; of a low-rank one its last factor."""
    module = layer.get_submodule(name)
    return cast(nn.Linear, module if isinstance(module, nn.Linear) else module.get_submodule("left"))
