"""A picture of a run: every request by its coming. Needs matplotlib, from the extra `plots`."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mnemosyne.load.requests import Outcome

COLORS = {"served": "#2563eb", "refused": "#d97706", "failed": "#dc2626"}


def draw(outcomes: Sequence[Outcome], path: str, ttft_s: float, tbt_s: float) -> None:
    """Write a PNG: TTFT and the p99 of TBT by the moment a request came, with both bounds."""
    with matplotlib.rc_context({"font.size": 10}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        first, second = figure.subplots(2, 1, sharex=True)
        _dots(first, outcomes, [o.ttft_s for o in outcomes], "TTFT, s", ttft_s)
        gaps = [1000 * float(np.percentile(o.tbt_s, 99)) if o.tbt_s else None for o in outcomes]
        _dots(second, outcomes, gaps, "p99 TBT of a request, ms", 1000 * tbt_s)
        second.set_xlabel("came at, s")
        first.legend(frameon=False, ncols=4)
        figure.savefig(path, dpi=130)


def _dots(axes, outcomes, values, title: str, bound: float) -> None:  # type: ignore[no-untyped-def]
    for end, color in COLORS.items():
        own = [(o.start_s, v or 0.0) for o, v in zip(outcomes, values, strict=True) if o.end == end]
        if own:
            axes.scatter(*zip(*own, strict=True), s=14, color=color, label=end)
    axes.axhline(bound, color="#6b7280", linewidth=0.8, linestyle="--", label="bound")
    axes.set_title(title, loc="left")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
