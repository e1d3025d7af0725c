"""A compressed model layer by layer, measured on its real tensors: what `inspect` shows and the manifest records."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from rich.table import Table
from torch import Tensor

from gemma_opt.gemma import GemmaModel
from gemma_opt.policy import Plan, PlanRow
from gemma_opt.recipe import TEXT_ROLES


@dataclass(frozen=True)
class Layer:
    """One row of the plan with what was measured.

    sparsity: share of exact zeros in the main weight. scale_min and scale_max: over its rows; None without scales.
    """

    row: PlanRow
    sparsity: float
    scale_min: float | None
    scale_max: float | None

    def to_json(self) -> dict[str, object]:
        """The measured part as a plain dictionary."""
        measured = asdict(self)
        del measured["row"]
        return measured


def measure(model: GemmaModel, plan: Plan) -> list[Layer]:
    """Every layer of the plan, measured."""
    modules = dict(model.named_modules())
    return [_measure_layer(row, dict(modules[row.name].state_dict(keep_vars=True))) for row in plan.rows]


def _measure_layer(row: PlanRow, tensors: dict[str, Tensor]) -> Layer:
    weight = tensors.get("weight", next(iter(tensors.values())))
    zeros = int((weight == 0).sum())
    scale = tensors.get("weight_scale")
    if scale is None:
        return Layer(row, zeros / weight.numel(), None, None)
    return Layer(row, zeros / weight.numel(), float(scale.min()), float(scale.max()))


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
    table.add_column("layer", footer=f"{len(layers)} layers", overflow="fold")
    table.add_column("role", footer="")
    table.add_column("shape", footer=f"{_total(layers, 'parameters'):,} parameters", justify="right")
    table.add_column("format")
    table.add_column("asked", justify="right")
    table.add_column("zeros", footer=f"{linear_sparsity(layers):.2%} of text linears", justify="right")
    table.add_column("scales", justify="right")
    table.add_column("bytes", footer=f"{_total(layers, 'bytes'):,}", justify="right")
    for layer in layers:
        row = layer.row
        asked = "" if row.ratio is None else f"{row.ratio:.2%}"
        scales = "" if layer.scale_min is None else f"{layer.scale_min:.2e} … {layer.scale_max:.2e}"
        shape = " × ".join(map(str, row.shape))
        table.add_row(row.name, row.role, shape, row.format, asked, f"{layer.sparsity:.2%}", scales, f"{row.bytes:,}")
    return table


def _total(layers: list[Layer], column: Literal["parameters", "bytes"]) -> int:
    return sum(getattr(layer.row, column) for layer in layers)
