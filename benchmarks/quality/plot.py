"""The sweep as one picture: perplexity of every recipe as a multiple of the dense model's."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
GOOD, FAIR, POOR = "#0b69a3", "#c98a04", "#c1440e"
BROKEN = 10.0  # ratio at the right edge: what is worse stands there with its figure
MARKERS = ("o", "D", "s", "^")


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot. One row a recipe, best first; a marker for each text (open: known by heart), a bar to the mean."""
    recipes = results["recipes"]
    dense = recipes["dense"]["perplexity"]
    ratios = {
        name: {text: value / dense[text] for text, value in entry["perplexity"].items()}
        for name, entry in recipes.items()
        if name != "dense"
    }
    memorised = set(results.get("memorised", ()))
    means = {name: fmean(value for text, value in found.items() if text not in memorised) for name, found in ratios.items()}
    names = sorted(means, key=lambda name: -means[name])
    figure = Figure(figsize=(10, 1.7 + 0.33 * len(names)), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        mean = min(means[name], BROKEN)
        colour = GOOD if mean <= 1.15 else FAIR if mean <= 2 else POOR
        axes.plot([1, mean], [row, row], color=colour, linewidth=7, alpha=0.28, solid_capstyle="butt", zorder=1)
        for marker, (text, ratio) in zip(MARKERS, ratios[name].items(), strict=False):
            fill = "white" if text in memorised else colour
            axes.plot([min(ratio, BROKEN)], [row], marker, color=colour, mfc=fill, markersize=6, zorder=3, clip_on=False)
        right = min(max(*ratios[name].values(), mean), BROKEN)
        axes.annotate(
            f"{means[name]:,.0f} ×" if means[name] >= 100 else f"{means[name]:.2f} ×",
            (right, row), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9, color=INK, annotation_clip=False,
        )  # fmt: skip
    axes.set_xscale("log")
    ticks = (1, 1.25, 1.5, 2, 3, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g} ×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.97, BROKEN)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    windows = recipes["dense"]["windows"]
    axes.set_title(
        "Gemma 3 270M: perplexity, × the dense model's", loc="left", fontsize=13, fontweight="bold", color=INK, pad=24
    )
    where = f"at most {windows} windows of 512 tokens from each text, of no kind calibrated on; blue to 1.15 ×, amber to 2 ×"
    axes.annotate(where, (0, 1), xycoords="axes fraction", xytext=(0, 8), textcoords="offset points", color=MUTED, fontsize=9)
    marks = [
        Line2D([], [], color=MUTED, marker=marker, linestyle="", label=text, mfc="white" if text in memorised else MUTED)
        for marker, text in zip(MARKERS, dense, strict=False)
    ]
    axes.legend(handles=marks, loc="upper right", frameon=False, labelcolor=INK, fontsize=9, handletextpad=0.2)
    figure.savefig(path, dpi=150, facecolor="white")
