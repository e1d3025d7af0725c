"""The frontier report: the Pareto set against a sweep, budgets by hand, and one real run on the bundled model."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from models import processing
from PIL import Image

from gemma_opt import cli
from gemma_opt.errors import UsageError
from gemma_opt.evaluation.agreement import Agreement
from gemma_opt.evaluation.suite import Evaluation, Measures, refuse_unmeasurable
from gemma_opt.gemma import Processing
from gemma_opt.recipe import Recipe
from gemma_opt.report import page
from gemma_opt.report.candidates import SAME_SPEED, Candidate, Speed, faster, frontier, recommend
from gemma_opt.report.measure import Report, SpeedTest, compare
from gemma_opt.report.page import FILES, as_html, as_markdown, write


def candidate(name: str, size: int, loss: float, speed: float = 1.0, *, is_base: bool = False) -> Candidate:
    agreement = {} if is_base else {"text": Agreement(1000, 20.0 * (1 + loss), 20.0, 0.1, 0.9)}
    evaluation = Evaluation({"text": 20.0 * (1 + loss)}, None, agreement)
    return Candidate(name, f"<b>{name}</b>", size, 0.0, Speed(10 * speed, speed, speed, speed), evaluation, is_base)


def report(*candidates: Candidate) -> Report:
    return Report("model.gguf", candidates, ("text",), Measures(), SpeedTest(), {"cpu": "a processor"})


INT8_RECIPE = Recipe.load("small-int8")
BASE = candidate("base", 1000, 0.0, is_base=True)
INT8 = candidate("int8", 520, 0.002, 1.5)
COMPACT = candidate("compact", 440, 0.04, 1.8)
ZEROS = candidate("zeros", 1000, 0.6, 1.01)


def sweep(candidates: list[Candidate]) -> set[str]:
    """The Pareto set of (bytes, loss) by sorting: keep what improves on the best loss of everything smaller."""
    kept, best = set[str](), float("inf")
    for size in sorted({one.bytes for one in candidates}):
        group = [one for one in candidates if one.bytes == size]
        least = min(one.loss for one in group)
        if least < best:
            kept |= {one.name for one in group if one.loss == least}
            best = least
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_the_size_frontier_is_what_a_sweep_keeps(seed: int) -> None:
    rng = random.Random(seed)
    many = [candidate(str(number), rng.randint(1, 12), rng.randint(0, 12) / 10) for number in range(rng.randint(1, 30))]
    assert {one.name for one in frontier(many, by="size")} == sweep(many)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_on_the_speed_frontier_is_beaten_and_everybody_off_it_is(seed: int) -> None:
    rng = random.Random(seed)
    many = [candidate(str(number), 1, rng.randint(0, 9) / 10, rng.choice((0.5, 1.0, 1.4, 2.0))) for number in range(20)]
    kept = {one.name for one in frontier(many, by="speed")}
    for one in many:  # these speeds differ by more than SAME_SPEED or not at all
        beaten = any(
            other.loss <= one.loss and other.speed.ratio >= one.speed.ratio
            and (other.loss < one.loss or other.speed.ratio > one.speed.ratio)
            for other in many
        )  # fmt: skip
        assert (one.name in kept) == (not beaten)


def test_a_lead_within_the_noise_is_no_lead() -> None:
    better, luckier = candidate("better", 1, 0.01, 1.0), candidate("luckier", 1, 0.02, 1 + 0.9 * SAME_SPEED)
    assert frontier([better, luckier], by="speed") == [better]
    faster = candidate("faster", 1, 0.02, 1 + 1.1 * SAME_SPEED)
    assert frontier([better, faster], by="speed") == [better, faster]


def test_loss_is_the_geometric_mean_over_texts() -> None:
    texts = {"a": Agreement(10, 40.0, 20.0, 0.1, 0.9), "b": Agreement(10, 30.0, 60.0, 0.3, 0.7)}
    one = Candidate("x", "", 1, 0.0, Speed(1, 1, 1, 1), Evaluation({}, None, texts))
    assert one.loss == pytest.approx(0.0, abs=1e-12)
    assert one.kl == pytest.approx(0.2)
    assert one.top1 == pytest.approx(0.8)


def test_every_budget_gets_its_recipe() -> None:
    found = {(row.budget, row.goal): row.recipe for row in recommend([BASE, INT8, COMPACT, ZEROS])}
    assert found["perplexity at most +0.5%", "smallest"] == "int8"
    assert found["perplexity at most +0.5%", "fastest"] == "int8"
    assert found["perplexity at most +5.0%", "smallest"] == "compact"
    assert found["perplexity at most +5.0%", "fastest"] == "compact"
    assert found["at most 60% of the base's bytes", "best quality"] == "int8"
    assert found["at most 40% of the base's bytes", "best quality"] is None


def spread(one: Candidate, low: float, high: float) -> Candidate:
    return replace(one, speed=replace(one.speed, ratio_low=low, ratio_high=high))


def test_a_lead_within_the_rounds_spread_is_a_tie_and_said_to_be_one() -> None:
    """The recipe with the luckiest rounds was called the fastest."""
    lucky, good = spread(candidate("lucky", 400, 0.004, 1.7), 1.3, 1.9), spread(INT8, 1.4, 1.8)
    (row,) = [
        row for row in recommend([BASE, good, lucky]) if (row.budget, row.goal) == ("perplexity at most +0.5%", "fastest")
    ]
    assert row.recipe == "int8"
    assert row.why.endswith("of better quality, and as fast as lucky (1.70 ×) within the rounds' spread")
    assert not faster(lucky, good)
    assert faster(spread(lucky, 1.6, 1.9), spread(INT8, 1.4, 1.55))
    assert [one.name for one in frontier([BASE, good, lucky], by="speed")] == ["base", "int8"]


def test_the_page_is_self_contained_and_safe() -> None:
    page = as_html(report(BASE, INT8, COMPACT, ZEROS, candidate("broken", 1000, 1e6)))
    assert "<svg" in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)", page)  # SVG refers to its own glyphs only
    assert not re.search(r"url\((?!#)", page)
    assert "<script" not in page
    assert "&lt;b&gt;int8&lt;/b&gt;" in page
    assert "<b>&lt;b&gt;" not in page


def test_the_markdown_table_is_complete() -> None:
    text = as_markdown(report(BASE, INT8, COMPACT, ZEROS))
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert len({rows[name].count("|") for name in ("recipe", "base", "int8", "compact", "zeros")}) == 1
    assert rows["int8"].endswith("size, speed |")
    assert rows["zeros"].endswith("|  |")
    assert "- cpu: a processor" in text


def test_a_recipe_beside_the_bundled_base(tmp_path: Path) -> None:
    recipes = [Recipe.load("small-int8"), Recipe.load("small-int8-pruned", ("sparsity.0.schedule.steps=1",))]
    heard = set[str]()
    arguments = (tmp_path / "checkpoints", Measures(charts=3, prompts=1), SpeedTest(8, 8, 2), "cpu")
    found = compare(recipes, None, *arguments, lambda what, done, total: heard.add(what))
    assert [one.name for one in found.candidates] == ["base", "small-int8", "small-int8-pruned"]
    base, int8, pruned = found.candidates
    assert 0.4 * base.bytes < int8.bytes < 0.7 * base.bytes
    assert abs(int8.loss) < 0.1
    assert pruned.sparsity >= 0.19
    assert int8.evaluation.greedy is not None
    assert all(one.speed.ratio_low <= one.speed.ratio <= one.speed.ratio_high for one in found.candidates)
    assert "small-int8: build" not in heard

    built = sorted((tmp_path / "checkpoints").glob("*/manifest.json"))
    times = [path.stat().st_mtime_ns for path in built]
    compare(recipes[:1], None, *arguments, lambda *call: None)
    assert [path.stat().st_mtime_ns for path in built] == times  # reused

    files = write(found, tmp_path)
    assert [path.name for path in files] == list(FILES)
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.width > 1500
    data = json.loads((tmp_path / "report.json").read_text())
    assert {one["name"] for one in data["candidates"]} == {"base", "small-int8", "small-int8-pruned"}
    assert data["conditions"]["batch"] == 1
    assert data["conditions"]["versions"]["torch"]
    assert data["frontier"]["size"]


def test_the_builtin_text_changes_nothing_else_that_was_asked(tmp_path: Path) -> None:
    """The story: without a text, the number of greedy prompts and the seed were forgotten."""
    asked = Measures(window=64, windows=1, seed=3, prompts=1)
    found = compare([INT8_RECIPE], None, tmp_path, asked, SpeedTest(8, 8, 1), "cpu", lambda *call: None)
    assert found.measures == replace(asked, texts=found.measures.texts)
    greedy = found.candidates[1].evaluation.greedy
    assert greedy is not None
    assert greedy.prompts == 2  # one from the text, one picture


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    int8, other = INT8_RECIPE, Recipe.load("gemma-3-4b-int8")
    rest = (tmp_path, Measures(), SpeedTest(), "cpu", lambda *call: None)
    with pytest.raises(UsageError, match="a name of its own"):
        compare([int8, int8], None, *rest)
    with pytest.raises(UsageError, match="different base models"):
        compare([int8, other], None, *rest)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("measures", "test", "named"),
    [
        (Measures({"short.txt": "Hello"}, window=64), SpeedTest(), "short.txt has"),
        (Measures(), SpeedTest(prompt_tokens=64, new_tokens=2000), "2,064, and a slot of this model holds 2,048"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_first_build(
    measures: Measures, test: SpeedTest, named: str, tmp_path: Path
) -> None:
    """It was found out after every recipe had been built; and a reply that its slot cut short was timed as if whole."""
    heard = set[str]()
    with pytest.raises(UsageError, match=named):
        compare([INT8_RECIPE], None, tmp_path, measures, test, "cpu", lambda what, done, total: heard.add(what))
    assert not heard
    assert list(tmp_path.iterdir()) == []


def test_charts_are_refused_for_a_model_that_reads_text_only() -> None:
    with pytest.raises(UsageError, match="charts are pictures"):
        refuse_unmeasurable(Processing(processing().tokenizer, None), Measures(charts=1))


def test_a_missing_package_is_said_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot came last, and without matplotlib hours of measuring were lost."""
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(UsageError, match=r"E2000 a report needs matplotlib: pip install '\.\[report\]'"):
        cli.report(["small-int8"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
