"""A picture of a comparison. Needs matplotlib, from the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mnemosyne.bench.compare import Result
from mnemosyne.bench.report import NUMBERS

SURFACE, INK, MUTED, GRID = "#ffffff", "#1f2328", "#6b7280", "#e5e7eb"
COLORS = ("#2563eb", "#d97706", "#0d9488", "#9333ea")
BAR = 0.8  # of the room of a case, shared by its engines


def draw(results: Sequence[Result], path: str | Path) -> None:
    """Write a PNG with one panel per kind of number, bars by case and engine.

    Args:
        results: with at least one run each.
        path: the file to write.
    """
    names = [name for name in NUMBERS if any(name in result.medians for result in results)]
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": GRID, "text.color": INK}):
        figure = Figure(figsize=(10, 2.8 * len(names)), facecolor=SURFACE, layout="constrained")
        panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
        for axes, name in zip(panels, names, strict=True):
            _draw_bars(axes, results, name)
        panels[0].legend(frameon=False, ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
        figure.savefig(path, dpi=130)


def _draw_bars(axes, results: Sequence[Result], name: str) -> None:  # type: ignore[no-untyped-def]
    found = [result for result in results if name in result.medians]
    cases = list(dict.fromkeys(result.case for result in found))
    engines = list(dict.fromkeys(result.engine for result in results))
    width = BAR / len(engines)
    title, digits, is_less_better = NUMBERS[name]
    for index, engine in enumerate(engines):
        own = [result for result in found if result.engine == engine]
        places = [cases.index(result.case) + (index + 0.5) * width - BAR / 2 for result in own]
        heights = [result.medians[name] for result in own]
        bars = axes.bar(places, heights, 0.92 * width, color=COLORS[index], label=engine)
        axes.bar_label(bars, [f"{height:,.{digits}f}" for height in heights], padding=2, fontsize=8)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_title(f"{title} ({'less' if is_less_better else 'more'} is better)", loc="left")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
