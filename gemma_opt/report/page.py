"""A report in words: the HTML page, the Markdown table, and the files of a report folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from importlib import resources
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from gemma_opt.errors import UsageError
from gemma_opt.report.candidates import Candidate, Recommendation
from gemma_opt.report.measure import Report
from gemma_opt.report.plot import WORST_SHOWN, as_svg, write_png
from gemma_opt.staging import storage_errors

FILES = ("report.html", "frontier.png", "report.md", "report.json")


def refuse_missing() -> None:
    """Raises UsageError without the packages that `write` needs: call it before anything is measured."""
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        raise UsageError(f"a report needs {' and '.join(missing)}: pip install '.[report]' in the repository's folder")


def write(report: Report, folder: Path) -> list[Path]:
    """Write page, plot, table and JSON into a folder. Returns their paths. Raises StorageError."""
    page, plot, table, data = (folder / name for name in FILES)
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(report.to_json(), indent=1) + "\n", "utf-8")  # first: the others can be made of it
        table.write_text(as_markdown(report), "utf-8")
        page.write_text(as_html(report), "utf-8")
        write_png(report.candidates, title(report), plot)
    return [page, plot, table, data]


def title(report: Report) -> str:
    """The report's headline."""
    return f"{report.base}: {len(report.candidates) - 1} recipes compared"


def as_html(report: Report) -> str:
    """One page that needs no other file."""
    from jinja2 import Environment
    from markupsafe import Markup

    template = (resources.files("gemma_opt") / "report" / "page.html").read_text("utf-8")
    columns = _columns(report)
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            title=title(report),
            summary=_summary(report),
            svg=Markup(as_svg(report.candidates)),  # noqa: S704 our own drawing, not a user's text
            worst=f"{WORST_SHOWN:g}",
            advice=_advice(report),
            headings=["recipe", "weights", "decode", *columns],
            rows=[_row(report, one, columns) for one in report.candidates],
            conditions=list(_conditions(report)),
        )
    )


def _advice(report: Report) -> dict[tuple[str, ...], list[tuple[str, list[Recommendation]]]]:
    """Goals → budgets with an answer for each goal: one table for every kind of budget."""
    tables = defaultdict[tuple[str, ...], list[tuple[str, list[Recommendation]]]](list)
    for budget, rows in groupby(report.recommendations, key=lambda row: row.budget):
        answers = list(rows)
        tables[tuple(row.goal for row in answers)].append((budget, answers))
    return tables


def as_markdown(report: Report) -> str:
    """The table, the recommendations and the conditions."""
    columns = _columns(report)
    head = ["recipe", "weights", "of base", "decode tok/s", "× base", *columns, "frontier"]
    lines = [f"# {title(report)}", "", _summary(report), "", _line(head), _line(["---", *["---:"] * (len(head) - 2), "---"])]
    base = report.candidates[0]
    for one in report.candidates:
        cells = [f"{value} ({note})" if note else value for value, note in _cells(report, one, columns)]
        figures = [f"{one.bytes / 1e6:,.1f} MB", f"{one.bytes / base.bytes:.0%}", f"{one.speed.tokens_per_second:.1f}"]
        lines.append(_line([one.name, *figures, f"{one.speed.ratio:.2f}", *cells, ", ".join(_tags(report, one))]))
    lines += ["", "## Recommended by budget", "", _line(["budget", "goal", "recipe", "gets"]), _line(["---"] * 4)]
    lines += [_line([row.budget, row.goal, row.recipe or "nothing", row.why]) for row in report.recommendations]
    lines += ["", "## Conditions", "", *(f"- {name}: {value}" for name, value in _conditions(report)), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _summary(report: Report) -> str:
    texts = ", ".join(report.texts)
    test = report.speed_test
    return (
        f"Quality on {texts}, as perplexity relative to the uncompressed base; decode speed at batch 1 after "
        f"{test.prompt_tokens} prompt tokens, base and recipe in turn for {test.rounds} rounds; all in one run. "
        "A lead in speed within the rounds' spread counts as none."
    )


def _columns(report: Report) -> list[str]:
    """Headings of the quality columns: one for each text, then what was measured beside them."""
    one = report.candidates[-1].evaluation
    extra = (["chart questions"] if one.charts else []) + ["KL", "top-1"] + (["greedy"] if one.greedy else [])
    return [*(f"perplexity, {name}" for name in report.texts), *extra, "zeros"]


def _cells(report: Report, one: Candidate, columns: list[str]) -> list[tuple[str, str]]:
    """Value and small print of each quality column."""
    found = one.evaluation
    cells = list[tuple[str, str]]()
    for name in report.texts:
        ratio = found.agreement[name].ratio if name in found.agreement else None
        cells.append((_figure(found.perplexity[name]), f"× {_figure(ratio)}" if ratio else ""))
    if "chart questions" in columns:
        cells.append((f"{found.charts.accuracy:.1%}", f"of {found.charts.questions}") if found.charts else ("", ""))
    cells += (
        [("–", ""), ("–", "")]
        if one.is_base
        else [(f"{one.kl:.4f}" if one.kl < 10 else _figure(one.kl), ""), (f"{one.top1:.1%}", "")]
    )
    if "greedy" in columns:
        cells.append((f"{found.greedy.share:.0%}", "") if found.greedy else ("–", ""))
    return [*cells, (f"{one.sparsity:.1%}", "")]


def _figure(value: float) -> str:
    """Four significant digits or so: 16.23, 1.004, 5,154."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _tags(report: Report, one: Candidate) -> list[str]:
    return [by for by in ("size", "speed") if one.name in report.on_frontier(by)]


def _row(report: Report, one: Candidate, columns: list[str]) -> dict[str, object]:
    base = report.candidates[0]
    largest, fastest = (max(values) for values in zip(*((c.bytes, c.speed.ratio) for c in report.candidates), strict=True))
    spread = "" if one.is_base else f" ({one.speed.ratio_low:.2f} to {one.speed.ratio_high:.2f})"
    return {
        "name": one.name,
        "description": one.description,
        "is_base": one.is_base,
        "tags": _tags(report, one),
        "size": f"{one.bytes / 1e6:,.1f} MB",
        "size_share": f"{one.bytes / base.bytes:.0%} of the base",
        "size_width": round(100 * one.bytes / largest),
        "speed": f"{one.speed.tokens_per_second:,.1f} tok/s",
        "speed_ratio": f"{one.speed.ratio:.2f} ×{spread}",
        "speed_width": round(100 * one.speed.ratio / fastest),
        "cells": _cells(report, one, columns),
    }


def _conditions(report: Report) -> Iterator[tuple[str, str]]:
    for name, value in report.conditions.items():
        if isinstance(value, dict):
            yield name, ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif value is not None:
            yield name, str(value)
    test, measures = report.speed_test, report.measures
    yield "speed", f"batch 1, greedy, {test.prompt_tokens} prompt tokens, {test.new_tokens} new tokens, {test.rounds} rounds"
    limit = f", at most {measures.windows} windows of each text" if measures.windows else ""
    yield "perplexity", f"windows of {measures.window} tokens, <bos> first{limit}"
    if measures.charts:
        yield "charts", f"{measures.charts} one-word questions about unseen pictures, seed {measures.seed}"
