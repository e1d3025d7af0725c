"""A compressed model layer by layer, measured on its real tensors: what `inspect` shows and the manifest records."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
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


def layer_table(title: str, layers: list[Layer], width: int) -> Table:
    """The layers as a table for people, at most `width` columns wide; figures are never cut.

    Where one line a layer is too wide, two figures share a column, one below the other, and names are broken at their dots.
    """
    rows = [_cells(layer) for layer in layers]
    wide = _table(title, layers, _WIDE, rows)
    console = Console(width=10_000)
    if Measurement.get(console, console.options, wide).maximum <= width:
        return wide
    stacked = [tuple("\n".join(row[column] for column in group).rstrip("\n") for group in _STACKS) for row in rows]
    stacked = [(name, *(_broken(figures) for figures in rest)) for name, *rest in stacked]
    headings = tuple("\n".join(_WIDE[column] for column in group) for group in _STACKS)
    taken = sum(max(map(_longest_line, column)) + _GAP for column in list(zip(headings, *stacked, strict=True))[1:])
    room = max(width - taken, _SHORTEST_NAME)
    return _table(title, layers, headings, [(_fold(name, room), *rest) for name, *rest in stacked])


_WIDE = ("layer", "role", "format", "shape", "bytes", "zeros", "asked", "scales", "inputs")
_STACKS = ((0,), (1, 2), (3, 4), (5, 6), (7, 8))  # columns of one layer that share a narrow column
_GAP = 2
_SHORTEST_NAME = 12


def _table(title: str, layers: list[Layer], headings: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    caption = (
        f"{len(layers)} layers; {_total(layers, 'parameters'):,} parameters; {_total(layers, 'bytes'):,} bytes; "
        f"{linear_sparsity(layers):.2%} zeros in text linears"
    )
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.pad_edge, table.padding = False, False, (0, _GAP - 1, 0, 0)
    for heading in headings:
        left = heading.partition("\n")[0] in ("layer", "role", "format")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _cells(layer: Layer) -> tuple[str, ...]:
    row = layer.row
    asked = "" if row.ratio is None else f"{row.ratio:.2%}"
    scales = "" if layer.scale_min is None else f"{layer.scales:,}: {layer.scale_min:.1e}…{layer.scale_max:.1e}"
    shape = " × ".join(map(str, row.shape))
    zeros = f"{layer.sparsity:.2%}"
    return row.name, row.role, str(row.format), shape, f"{row.bytes:,}", zeros, asked, scales, _inputs(layer)


def _broken(figures: str) -> str:
    """The number of scales above their range, a format's options below its name."""
    return figures.replace(": ", "\n").replace(" g", "\ng")


def _longest_line(cell: str) -> int:
    return max(map(len, cell.split("\n")))


def _fold(name: str, width: int) -> str:
    """A module's name in lines of at most `width`, broken behind dots; a longer part is broken anywhere."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+$", name):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line[start : start + width] for line in lines for start in range(0, len(line), width))


def _inputs(layer: Layer) -> str:
    """What happens to a layer's input before the product."""
    if layer.input_scale is not None:
        return f"{layer.input_scale:.2e}"
    return "a token" if layer.row.format.activation.endswith("dynamic") else ""


def _total(layers: list[Layer], column: Literal["parameters", "bytes"]) -> int:
    return sum(getattr(layer.row, column) for layer in layers)
