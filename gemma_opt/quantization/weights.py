"""Bring every weight of a model into the format that the plan gives it: in place, one module at a time.

Float formats are storage formats: weights are rounded to them and stay in the dtype the model computes in. Quantized ones
replace the module by one that holds plain quantized tensors (`linear`, `table`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from gemma_opt import layout
from gemma_opt.calibration import CalibrationData, Store, random_samples
from gemma_opt.errors import PlanError, WeightsError
from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Plan, PlanRow, Progress, planned_weights, quiet
from gemma_opt.quantization.calibrated import in_decoder, quantize_layers_
from gemma_opt.quantization.handlers import bias_of, empty_linear, linear_at, linear_of, round_weight_, weigh
from gemma_opt.quantization.linear import QuantizedLinear
from gemma_opt.quantization.table import Int8Embedding, Int8Head
from gemma_opt.recipe import FLOATS, StoredFormat, Tied

HEAD = "lm_head"


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
def quantize_(model: nn.Module, plan: Plan, progress: Progress = quiet, data: CalibrationData | None = None) -> None:
    """Bring every planned weight into its format: linears become `QuantizedLinear`s, an int8 table serves its tied head too.

    Needs the memory of one more layer in float32. Zeros stay exactly zero. data: for formats with `needs_data`; those that
    only measure take random tokens where it is None. Raises WeightsError for weights that are unusable or overflow their
    format, and PlanError where the model is not, or did not become, the planned one.
    """
    sanitize_(model)
    _refuse_overflow(planned_weights(model, plan.rows), plan)
    later = _walked(model, plan, data)
    if later and data is None:
        data = _random_data(cast(GemmaModel, model))
    now = [row for row in plan.rows if row.name not in later]
    for done, row in enumerate(now, start=1):
        if isinstance(row.format, FLOATS):
            round_weight_(model, row)
        elif row.kind == "embedding":
            _replace_table_(model, row, **weigh(row.format, _table(model, row).weight.detach()))
        elif not isinstance(row.format, Tied):
            linear = linear_at(model, row)
            tensors = weigh(row.format, linear.weight.detach())
            model.set_submodule(row.name, linear_of(row.format, tensors, bias_of(linear)))
        progress(done, len(plan.rows), row.name)
    if data and later:
        quantize_layers_(model, plan, data, lambda done, _, name: progress(len(now) + done, len(plan.rows), name))
    _reconcile(model, plan)


def _walked(model: nn.Module, plan: Plan, data: CalibrationData | None) -> set[str]:
    """Names of the linears that are quantized layer by layer: all of the decoder's, where a format of theirs measures."""
    needing = [row for row in plan.rows if row.format.needs_data]
    if needing and data is None:
        raise PlanError(f"{needing[0].format} needs calibration data, and the pipeline was given none")
    if not any(row.format.measures for row in plan.rows):
        return set()
    decoder = in_decoder(model, plan)
    walked = {row.name for row in decoder} if any(row.format.measures for row in decoder) else set[str]()
    if elsewhere := [row.name for row in needing if row.name not in walked]:
        raise PlanError("formats that need data are measured in decoder layers only:\n  " + "\n  ".join(elsewhere))
    return walked


def _random_data(model: GemmaModel) -> CalibrationData:
    config = model.config.get_text_config()
    image_token = getattr(model.config, "image_token_id", -1)
    return CalibrationData(random_samples(config.vocab_size, config.bos_token_id, image_token), Store())


def roundings(plan: Plan) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name → what `quantize_` will make of a weight, as float32, for every planned linear: for training behind it."""

    def rounding(stored: StoredFormat) -> Callable[[Tensor], Tensor]:
        return lambda weight: linear_of(stored, weigh(stored, weight), None).dequantize()

    return {row.name: rounding(row.format) for row in plan.quantized() if row.kind == "linear"}


def empty_like_plan_(model: nn.Module, plan: Plan) -> None:
    """Replace the planned modules by empty ones, on the model's device (meta): the module tree that `quantize_` leaves.

    A checkpoint can then be loaded strictly into it. Raises PlanError where the model is not the planned one.
    """
    planned_weights(model, plan.rows)
    for row in plan.quantized():
        if row.kind == "embedding":
            device = _table(model, row).weight.device
            specs = layout.tensors(row.format, row.shape)
            _replace_table_(model, row, **{name: spec.empty(device) for name, spec in specs.items()})
        else:
            model.set_submodule(row.name, empty_linear(row.format, linear_at(model, row)))
    _reconcile(model, plan)


def _table(model: nn.Module, row: PlanRow) -> nn.Embedding:
    module = model.get_submodule(row.name)
    if not isinstance(module, nn.Embedding):
        raise PlanError(f"{row.name}: is planned as {row.format}, and is a {type(module).__name__}, not an embedding")
    return module


def _replace_table_(model: nn.Module, row: PlanRow, weight: Tensor, weight_scale: Tensor) -> None:
    old = _table(model, row)
    factor = cast(float, getattr(old, "scalar_embed_scale", 1.0))
    table = Int8Embedding(weight, weight_scale, factor, old.weight.dtype)
    model.set_submodule(row.name, table)
    model.set_submodule(HEAD, Int8Head(table))


def _reconcile(model: nn.Module, plan: Plan) -> None:
    made = {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear | Int8Embedding)}
    wrong = made ^ {row.name for row in plan.quantized()}
    if wrong:
        raise PlanError("quantized as planned or as found, not both:\n  " + "\n  ".join(sorted(wrong)))


def _refuse_overflow(weights: dict[str, nn.Parameter], plan: Plan) -> None:
    wrong: list[str] = []
    for name, weight in weights.items():
        stored = plan[name].format
        if isinstance(stored, FLOATS):
            low, high = weight.aminmax()
            if not torch.stack((low, high)).to(layout.float_dtype(stored)).isfinite().all():
                wrong.append(f"{name}: reaches {max(-float(low), float(high)):g}, beyond {stored}")
    if wrong:
        raise WeightsError(f"{len(wrong)} layers overflow their format:\n  " + "\n  ".join(wrong))


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which are NaN where any value is: no temporary of the tensor's size."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = (tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()).aminmax()  # float8 has no extremes
    return bool(low.isfinite() & high.isfinite())
