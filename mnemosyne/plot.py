"""Pictures of a run. Needs matplotlib, from the extra `plots`; nothing else imports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from mnemosyne.metrics import StepRecord

SURFACE, INK, MUTED, GRID = "#ffffff", "#1f2328", "#6b7280", "#e5e7eb"
BLUE, ORANGE, TEAL = "#2563eb", "#d97706", "#0d9488"
LINES = (BLUE, ORANGE, TEAL, "#9333ea", "#dc2626", "#6b7280")  # of as many curves


def draw_run(
    records: Sequence[StepRecord], path: str | Path, *, target_s: float | None = None
) -> None:
    """Write a PNG of three panels over time: chunk size, step time, pages in use.

    Args:
        records: the steps of a run, in order.
        path: the file to write.
        target_s: target time between tokens in seconds, drawn as a line.

    Raises:
        ValueError: if there are no records.
    """
    if not records:
        raise ValueError("records must hold at least one step, got none; run something first")
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": GRID, "text.color": INK}):
        figure = Figure(figsize=(10, 8), facecolor=SURFACE, layout="constrained")
        chunk_axes, time_axes, page_axes = figure.subplots(
            3, 1, sharex=True, height_ratios=[3, 3, 2]
        )
        times_s = [record.time_s for record in records]
        _draw_chunks(chunk_axes, records)
        _draw_times(time_axes, records, times_s, target_s)
        used = [100 * record.pages_used / record.num_pages for record in records]
        page_axes.plot(times_s, used, color=TEAL, linewidth=1.6)
        page_axes.set(ylabel="cache in use, %", xlabel="time, s", ylim=(0, None))
        for axes in (chunk_axes, time_axes, page_axes):
            tidy(axes)
        figure.savefig(path, dpi=130)


def draw_frontier(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str,
    target: tuple[float, float],
) -> None:
    """Write a PNG of TTFT against TBT, one curve per layout.

    Args:
        curves: by name of the layout, ``(tbt_s, ttft_s)`` in order of the budget of a step.
        path: the file to write.
        title: above the plot.
        target: ``(tbt_s, ttft_s)``; what is below and left of it meets both.
    """
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": GRID, "text.color": INK}):
        figure = Figure(figsize=(9, 5.5), facecolor=SURFACE, layout="constrained")
        axes = figure.subplots()
        for (name, points), color in zip(curves.items(), LINES, strict=False):
            tbt_ms = [1e3 * tbt_s for tbt_s, _ in points]
            axes.plot(tbt_ms, [ttft_s for _, ttft_s in points], color=color, label=name)
        axes.set(xscale="log", yscale="log", xlabel="TBT, ms", ylabel="TTFT, s")
        axes.axvline(1e3 * target[0], color=INK, linewidth=1, linestyle="--")
        axes.axhline(target[1], color=INK, linewidth=1, linestyle="--")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_minor_formatter(NullFormatter())
        axes.set_title(title, loc="left")
        figure.legend(frameon=False, title="pp x kvp x tp", loc="outside right upper")
        tidy(axes)
        figure.savefig(path, dpi=130)


def tidy(axes) -> None:  # type: ignore[no-untyped-def]
    """Take from axes what does not help to read them."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(which="both", colors=MUTED, length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_chunks(axes, records: Sequence[StepRecord]) -> None:  # type: ignore[no-untyped-def]
    prefilling = [record for record in records if record.chunks]
    axes.scatter(
        [record.time_s for record in prefilling],
        [record.chunk_tokens for record in prefilling],
        s=12,
        color=BLUE,
        linewidths=0,
        label="prefill tokens of the step",
    )
    if prefilling:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set(ylabel="prefill tokens per step")
    axes.set_title("Prefill tokens and time of every step", loc="left")


def _draw_times(  # type: ignore[no-untyped-def]
    axes, records: Sequence[StepRecord], times_s: Sequence[float], target_s: float | None
) -> None:
    actual = [1e3 * record.actual_s for record in records]
    predicted = [1e3 * record.predicted_s for record in records]
    axes.scatter(times_s, actual, s=12, color=BLUE, linewidths=0, label="actual")
    axes.plot(times_s, predicted, color=ORANGE, linewidth=1.2, alpha=0.9, label="predicted")
    if target_s is not None:
        axes.axhline(1e3 * target_s, color=INK, linewidth=1.2, linestyle="--", label="target")
    axes.set(ylabel="step time, ms", ylim=(0, None))
    # above the panel: there is no corner of it that no run reaches
    axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
