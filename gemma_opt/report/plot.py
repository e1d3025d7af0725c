"""The frontier as a figure: quality against size, and against speed. PNG for files, SVG for the page.

Needs matplotlib, which is imported where it draws: `page.refuse_missing` asks for it in time.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_opt.report.candidates import Candidate, frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, ACCENT, BASE_COLOUR = "#1f2933", "#7b8794", "#e4e7eb", "#0b69a3", "#c1440e"
WORST_SHOWN = 8.0  # perplexity ratio at the top of the plot: what is worse is broken, and stands at the edge with its figure
LABEL_OFFSETS = [(9, 0), (-9, 0), (9, 10), (-9, 10), (9, -10), (-9, -10), (0, 13), (0, -13), (12, 20), (-12, 20), (12, -20),
                 (-12, -20), (14, 30), (-14, 30), (14, -30), (-14, -30), (16, 42), (-16, 42)]  # fmt: skip


def write_png(candidates: Sequence[Candidate], title: str, path: Path) -> None:
    """Write the figure as PNG."""
    draw(candidates, title).savefig(path, dpi=160, facecolor="white")


def as_svg(candidates: Sequence[Candidate]) -> str:
    """The figure as an `<svg>` element, text as outlines so that it looks alike everywhere."""
    buffer = io.StringIO()
    draw(candidates, "").savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def draw(candidates: Sequence[Candidate], title: str) -> Figure:
    """Both panels side by side. Lower is better; left is smaller, right is faster."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: dict[str, object] = {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "svg.hashsalt": "gemma-opt",
        "axes.labelcolor": INK,
        "text.color": INK,
    }
    with mpl.rc_context(style):  # pyright: ignore[reportArgumentType] keys are spelled as a Literal there
        figure = Figure(figsize=(12.5, 5.4), layout="constrained")
        if title:
            figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold")
        size, speed = figure.subplots(1, 2, sharey=True)
        _draw_panel(size, candidates, by="size")
        _draw_panel(speed, candidates, by="speed")
        figure.draw_without_rendering()
        for axes, by in ((size, "size"), (speed, "speed")):
            _label(axes, candidates, by=by)
        return figure


def _point(one: Candidate, by: str) -> tuple[float, float]:
    return one.bytes / 1e6 if by == "size" else one.speed.ratio, min(1 + one.loss, WORST_SHOWN)


def _draw_panel(axes: Axes, candidates: Sequence[Candidate], *, by: str) -> None:
    best = frontier(candidates, by=by)
    points = [_point(one, by) for one in best]
    axes.plot(*zip(*sorted(points), strict=True), color=ACCENT, linewidth=1.4, alpha=0.55, zorder=2)
    for one in candidates:
        x, y = _point(one, by)
        if by == "speed" and not one.is_base:
            axes.plot([one.speed.ratio_low, one.speed.ratio_high], [y, y], color=MUTED, linewidth=1, zorder=1)
        colour = BASE_COLOUR if one.is_base else ACCENT if one in best else MUTED
        face = colour if one in best or one.is_base else "white"
        marker = "D" if one.is_base else "^" if y >= WORST_SHOWN else "o"
        axes.plot([x], [y], marker=marker, markersize=7.5, color=colour, markerfacecolor=face, markeredgewidth=1.5, zorder=3)
    worst = max(y for _, y in (_point(one, by) for one in candidates))
    if worst > 2:
        axes.set_yscale("log")
        ticks = [tick for tick in (1, 1.25, 1.5, 2, 3, 5, 8) if tick <= worst * 1.2]
        axes.set_yticks(ticks, [f"{tick:g} ×" for tick in ticks])
        axes.set_yticks([], minor=True)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.margins(x=0.2, y=0.12)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelleft=True)
    words = (
        ("Quality against size", "weights, MB (← smaller)")
        if by == "size"
        else ("Quality against speed", "decode speed, × the base, batch 1 (faster →)")
    )
    axes.set_title(words[0], loc="left", fontsize=11, fontweight="bold", pad=10)
    axes.set_xlabel(words[1])
    axes.set_ylabel("perplexity, × the base (↓ better)")


def _label(axes: Axes, candidates: Sequence[Candidate], *, by: str) -> None:
    """Write every name beside its point where it covers neither a point nor another name."""
    from matplotlib.patheffects import withStroke

    best = frontier(candidates, by=by)
    spots = [axes.transData.transform(_point(one, by)) for one in candidates]
    pixels = axes.figure.dpi / 72
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    if by == "speed":
        taken += [_spread_box(axes, one) for one in candidates]
    frame = axes.get_window_extent()
    for one, (x, y) in sorted(zip(candidates, spots, strict=True), key=lambda item: item[0] not in best):
        text = one.name if 1 + one.loss <= WORST_SHOWN else f"{one.name} ({1 + one.loss:,.0f} ×)"
        width, height = 6.3 * len(text) * pixels * 0.88, 12 * pixels
        boxes = [(offset, _box(x, y, offset, width, height, pixels)) for offset in LABEL_OFFSETS]
        inside = [entry for entry in boxes if entry[1][0] >= frame.x0 - 10 and entry[1][2] <= frame.x1 + 10] or boxes
        offset, box = next((entry for entry in inside if not any(_overlap(entry[1], other) for other in taken)), inside[0])
        taken.append(box)
        axes.annotate(
            text,
            _point(one, by),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center",
            va="center",
            fontsize=8.8,
            color=INK if one in best or one.is_base else MUTED,
            fontweight="bold" if one in best else "normal",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": GRID, "shrinkA": 0, "shrinkB": 4} if abs(offset[1]) >= 20 else None,
        )


def _spread_box(axes: Axes, one: Candidate) -> Box:
    """The pixels that a speed's error bar covers."""
    height = min(1 + one.loss, WORST_SHOWN)
    (left, y), (right, _) = (axes.transData.transform((ratio, height)) for ratio in (one.speed.ratio_low, one.speed.ratio_high))
    return left, y - 2, right, y + 2


Box = tuple[float, float, float, float]


def _box(x: float, y: float, offset: tuple[int, int], width: float, height: float, pixels: float) -> Box:
    left = x + offset[0] * pixels - (0 if offset[0] > 0 else width if offset[0] < 0 else width / 2)
    bottom = y + offset[1] * pixels - height / 2
    return left, bottom, left + width, bottom + height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
