"""The quality sweep's machinery on the bundled model: results per recipe, resumed, and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks.quality import sweep
from benchmarks.quality.plot import draw
from gemma_opt.calibration import Store
from gemma_opt.recipe import Fp32, Int8

TEXTS = {"bars": "A bar chart with three bars: red, blue and green. " * 60, "shapes": "A red circle above a blue star. " * 90}
ENTRIES: list[sweep.Entry] = [
    {"name": "dense"},
    {"name": "int8", "quantization": {"default": "int8"}},
    {"name": "half", "sparsity": [{"method": "magnitude", "ratio": 0.5}]},
    {"name": "from-the-future", "sparsity": [{"method": "telepathy", "ratio": 0.5}]},
]


def test_a_sweep_measures_resumes_and_leaves_out_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    sweep.sweep(ENTRIES[:2], TEXTS, "small-gemma3", out, Store(), windows=1)
    first = json.loads(out.read_text())["recipes"]
    assert first.keys() == {"dense", "int8"}
    sweep.sweep(ENTRIES, TEXTS, "small-gemma3", out, Store(), windows=1)
    second = json.loads(out.read_text())["recipes"]
    assert second.keys() == {"dense", "int8", "half"}
    assert {name: second[name] for name in first} == first  # not measured again: the same seconds
    assert "from-the-future: left out" in capsys.readouterr().err
    assert second["half"]["perplexity"]["bars"] != second["dense"]["perplexity"]["bars"]
    assert second["int8"]["bytes"] < second["dense"]["bytes"]
    assert second["dense"]["where"]["versions"]["torch"]
    draw(json.loads(out.read_text()), tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 1000


def test_other_texts_or_windows_are_measured_again() -> None:
    keys = {
        sweep._key(ENTRIES[0], TEXTS, 1),
        sweep._key(ENTRIES[0], TEXTS, 2),
        sweep._key(ENTRIES[0], TEXTS | {"bars": "other"}, 1),
        sweep._key(ENTRIES[1], TEXTS, 1),
    }
    assert len(keys) == 4


def test_the_list_covers_what_it_promises() -> None:
    entries = yaml.safe_load(sweep.ENTRIES.read_text("utf-8"))
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names)) >= 14
    methods = {stage["method"] for entry in entries for stage in entry.get("sparsity", [])}
    assert methods == {"magnitude", "gradual", "layer_norm", "rows", "wanda", "sparsegpt", "admm", "compact"}
    for method in ("magnitude", "layer_norm", "wanda", "sparsegpt"):
        ratios = {stage["ratio"] for entry in entries for stage in entry.get("sparsity", []) if stage["method"] == method}
        assert ratios >= {0.1, 0.3, 0.5}


def test_plain_entries_are_recipes(tmp_path: Path) -> None:
    recipe = sweep.recipe_of({"name": "int8", "quantization": {"default": "int8"}}, "small-gemma3", tmp_path)
    assert recipe.quantization.default == Int8()
    assert recipe.quantization.roles.embedding == Fp32()
    assert recipe.model.dtype == "float32"
