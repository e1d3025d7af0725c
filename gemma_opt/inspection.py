"""A compressed model layer by layer, measured on its real tensors: what `inspect` shows and the manifest records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from rich.table import Table
from torch import nn

from gemma_opt.errors import PlanError
from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Plan, PlanRow, main_parameter
from gemma_opt.quantization import Int8Embedding, Int8Head, QuantizedLinear
from gemma_opt.recipe import TEXT_ROLES


@dataclass(frozen=True)
class Layer:
    """One row of the plan with what was measured.

    sparsity: share of exact zeros in the main weight. scale_min, scale_max and scales: the extremes and number of its scales
    (one a row, or one a group of neighbours in a row); None and 0 without scales. input_scale: the calibrated one of a static
    format, None for others.
    """

    row: PlanRow
    sparsity: float
    scale_min: float | None = None
    scale_max: float | None = None
    scales: int = 0
    input_scale: float | None = None

    def to_json(self) -> dict[str, object]:
        """The measured part as a plain dictionary."""
        measured = asdict(self)
        del measured["row"]
        return measured


def measure(model: GemmaModel, plan: Plan) -> list[Layer]:
    """Every layer of the plan, measured."""
    return [_measure_layer(row, model.get_submodule(row.name)) for row in plan.rows]


def _measure_layer(row: PlanRow, module: nn.Module) -> Layer:
    if isinstance(module, QuantizedLinear | Int8Embedding):
        scale, given = module.weight_scale, getattr(module, "input_scale", None)
        zeros = module.zeros() / math.prod(row.shape)
        return Layer(row, zeros, float(scale.min()), float(scale.max()), scale.numel(), None if given is None else float(given))
    if isinstance(module, Int8Head):
        return _measure_layer(row, module.table)
    weight = main_parameter(module)
    if weight is None:
        raise PlanError(f"{row.name}: has no weight to measure")
    return Layer(row, int((weight == 0).sum()) / weight.numel())


def linear_sparsity(layers: list[Layer]) -> float:
    """Share of exact zeros in the weights of all text linears."""
    linears = [layer for layer in layers if layer.row.kind == "linear" and layer.row.role in TEXT_ROLES]
    return sum(layer.sparsity * math.prod(layer.row.shape) for layer in linears) / sum(
        math.prod(layer.row.shape) for layer in linears
    )


def to_json(layers: list[Layer]) -> dict[str, object]:
    """Every layer and the totals, as plain values."""
    rows = [
        row | layer.to_json() for row, layer in zip(Plan(tuple(layer.row for layer in layers)).to_json(), layers, strict=True)
    ]
    return {
        "layers": rows,
        "totals": {
            "parameters": _total(layers, "parameters"),
            "bytes": _total(layers, "bytes"),
            "text_linear_sparsity": linear_sparsity(layers),
        },
    }


def layer_table(title: str, layers: list[Layer]) -> Table:
    """The layers as a table for people, with a line of totals."""
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("layer", footer=f"{len(layers)} layers", no_wrap=True)
    table.add_column("role", footer="")
    table.add_column("shape", footer=f"{_total(layers, 'parameters'):,} parameters", justify="right")
    table.add_column("format")
    table.add_column("asked", justify="right")
    table.add_column("zeros", footer=f"{linear_sparsity(layers):.2%} (text)", justify="right")
    table.add_column("scales", justify="right")
    table.add_column("inputs", justify="right")
    table.add_column("bytes", footer=f"{_total(layers, 'bytes'):,}", justify="right")
    for layer in layers:
        row = layer.row
        asked = "" if row.ratio is None else f"{row.ratio:.2%}"
        scales = "" if layer.scale_min is None else f"{layer.scales:,}: {layer.scale_min:.1e}…{layer.scale_max:.1e}"
        shape = " × ".join(map(str, row.shape))
        table.add_row(
            row.name, row.role, shape, str(row.format), asked, f"{layer.sparsity:.2%}", scales, _inputs(layer), f"{row.bytes:,}"
        )
    return table


def _inputs(layer: Layer) -> str:
    """What happens to a layer's input before the product."""
    if layer.input_scale is not None:
        return f"{layer.input_scale:.2e}"
    return "a token" if layer.row.format.activation.endswith("dynamic") else ""


def _total(layers: list[Layer], column: Literal["parameters", "bytes"]) -> int:
    return sum(getattr(layer.row, column) for layer in layers)
