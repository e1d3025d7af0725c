"""Bring every weight of a model into the format that the plan gives it: in place, one layer at a time.

int8 rows come from torchao's `quantize_`; its data and scales are taken out at once and put into plain modules. Float
formats are storage formats: weights are rounded to them and stay in the dtype the model computes in.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gemma_opt.errors import PlanError, WeightsError
from gemma_opt.policy import Plan, PlanRow, Progress, StoredFormat, planned_weights, quiet, stored_dtype
from gemma_opt.quantization.linear import Int8Linear


def sanitize_(model: nn.Module) -> None:
    """Make every parameter contiguous. Raises a WeightsError naming every tensor that is missing (meta), NaN or infinite."""
    wrong: list[str] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            wrong.append(f"{name}: has no data (meta device)")
        elif not _is_finite(tensor):
            wrong.append(f"{name}: holds NaN or infinite values")
        elif isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.contiguous()
    if wrong:
        raise WeightsError(f"{len(wrong)} tensors are unusable:\n  " + "\n  ".join(wrong))


@torch.no_grad()
def quantize_(model: nn.Module, plan: Plan, progress: Progress = quiet) -> None:
    """Bring every planned weight into its format; the planned int8 linears become `Int8Linear`.

    Needs the memory of one more layer in float32. Zeros stay exactly zero. Raises WeightsError for weights that are unusable
    or overflow their format, and PlanError where the model is not, or did not become, the planned one.
    """
    sanitize_(model)
    _refuse_overflow(planned_weights(model, plan.rows), plan)
    for done, row in enumerate(plan.rows, start=1):
        _CONVERT[row.format](model, row)
        progress(done, len(plan.rows), row.name)
    _reconcile(model, plan)


def empty_like_plan_(model: nn.Module, plan: Plan) -> None:
    """Replace the planned int8 linears by empty ones, on the model's device (meta): the module tree that `quantize_` leaves.

    A checkpoint can then be loaded strictly into it. Raises PlanError where the model is not the planned one.
    """
    planned_weights(model, plan.rows)
    for row in plan.quantized():
        linear = _linear(model, row)
        weight = torch.empty_like(linear.weight, dtype=torch.int8, requires_grad=False)
        scale = linear.weight.new_empty(linear.out_features, dtype=torch.float32, requires_grad=False)
        _replace_(model, row, weight, scale)
    _reconcile(model, plan)


def _to_int8_(model: nn.Module, row: PlanRow) -> None:
    _replace_(model, row, *_int8_rows(_linear(model, row).weight.detach()))


def _round_(model: nn.Module, row: PlanRow) -> None:
    weight = planned_weights(model, [row])[row.name]
    if weight.dtype != stored_dtype(row.format):
        weight.copy_(weight.to(stored_dtype(row.format)))


def _leave(model: nn.Module, row: PlanRow) -> None:
    """A tied weight follows the one it is tied to."""


_CONVERT: dict[StoredFormat, Callable[[nn.Module, PlanRow], None]] = {
    "fp32": _round_,
    "bf16": _round_,
    "fp16": _round_,
    "int8": _to_int8_,
    "tied": _leave,
}


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """torchao's symmetric int8 rows of a weight [out, in]: int8 [out, in] and float32 scales [out], never zero.

    Quantized from float32, or the scales of a bfloat16 weight would carry its rounding.
    """
    # Imported here: it takes a second, and logs about extension libraries this package does not use.
    from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    with torch.device("meta"):
        scratch = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    scratch.weight = nn.Parameter(weight.float(), requires_grad=False)
    # torchao would otherwise change inductor's settings for the whole process.
    torchao_quantize_(scratch, Int8WeightOnlyConfig(set_inductor_config=False))
    rows = scratch.weight
    if not isinstance(rows, Int8Tensor):
        raise PlanError(f"torchao left a weight of shape {list(weight.shape)} as it was")
    return rows.qdata.contiguous(), rows.scale.reshape(-1).float()


def _linear(model: nn.Module, row: PlanRow) -> nn.Linear:
    module = model.get_submodule(row.name)
    if not isinstance(module, nn.Linear):
        raise PlanError(f"{row.name}: is planned as int8, and is a {type(module).__name__}, not a linear")
    return module


def _replace_(model: nn.Module, row: PlanRow, weight: Tensor, scale: Tensor) -> None:
    bias = dict(_linear(model, row).named_parameters()).get("bias")
    model.set_submodule(row.name, Int8Linear(weight, scale, None if bias is None else bias.detach()))


def _reconcile(model: nn.Module, plan: Plan) -> None:
    made = {name for name, module in model.named_modules() if isinstance(module, Int8Linear)}
    wrong = made ^ {row.name for row in plan.quantized()}
    if wrong:
        raise PlanError("int8 as planned or as found, not both:\n  " + "\n  ".join(sorted(wrong)))


def _refuse_overflow(weights: dict[str, nn.Parameter], plan: Plan) -> None:
    wrong: list[str] = []
    for name, weight in weights.items():
        stored = plan[name].format
        if stored in ("fp32", "bf16", "fp16"):
            low, high = weight.aminmax()
            if not torch.stack((low, high)).to(stored_dtype(stored)).isfinite().all():
                wrong.append(f"{name}: reaches {max(-float(low), float(high)):g}, beyond {stored}")
    if wrong:
        raise WeightsError(f"{len(wrong)} layers overflow their format:\n  " + "\n  ".join(wrong))


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which are NaN where any value is: no temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()
    return bool(low.isfinite() & high.isfinite())
