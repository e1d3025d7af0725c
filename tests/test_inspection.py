"""The table of layers for people: whatever the width, no figure is cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gemma_opt.inspection import Layer, layer_table
from gemma_opt.policy import plan
from gemma_opt.recipe import Recipe
from tests.shapes import gemma_4b


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    """The 4B as a phone gets it, the widest formats there are; scales made up."""
    rows = plan(gemma_4b(), Recipe.load("gemma-3-4b-mobile")).rows
    return [Layer(row, 0.125, 1.5e-4, 2.5e-3, row.shape[0], 0.75) if row.is_quantized else Layer(row, 0.0) for row in rows]


def printed(layers: list[Layer], width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(layer_table("mobile", layers, console.width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [80, 100, 120, 400])
def test_no_figure_is_cut(layers: list[Layer], width: int) -> None:
    lines = printed(layers, width)
    words = " ".join(lines).split()
    assert max(map(len, lines)) <= width
    assert not [word for word in words if word.endswith("…")]
    assert sum(word == "1.5e-04…2.5e-03" for word in words) == sum(layer.scales > 0 for layer in layers)
    assert sum(word == "int8_dynamic_int4" for word in words) == sum("int4" in str(layer.row.format) for layer in layers)
    assert f"{sum(layer.row.bytes for layer in layers):,} bytes" in " ".join(words)


def test_a_pipe_gets_one_line_a_layer_with_its_whole_name(layers: list[Layer]) -> None:
    lines = printed(layers, 400)
    assert all(any(line.startswith(f"{layer.row.name} ") for line in lines) for layer in layers)
