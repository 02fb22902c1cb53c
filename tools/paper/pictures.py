"""The plots of docs/paper.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from mnemosyne.plot import GRID, INK, LINES, SURFACE, tidy

M = 2**20
Results = dict[str, Any]
DRAWN = {
    "lars": 0,
    "fcfs, adaptive": 2,
    "vLLM-like, 512": 3,
    "vLLM-like, 2048": 4,
    "LoongServe-like": 1,
}  # colours


def draw_all(results: Results, folder: Path) -> None:
    """Write every plot of the page into a folder."""
    draw_attention(results, folder / "attention.png")
    draw_plane(results, folder / "plane.png")
    draw_scaling(results, folder / "scaling.png")
    draw_groups(results, folder / "groups.png")
    draw_mixes(results, folder / "mixes.png")


@contextmanager
def picture(path: Path, *, columns: int = 1) -> Iterator[list[Any]]:
    """Axes of a figure that is written at the end."""
    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": GRID, "text.color": INK}):
        figure = Figure(figsize=(4.8 * columns + 1.2, 4), facecolor=SURFACE, layout="constrained")
        axes = list(figure.subplots(1, columns, squeeze=False)[0])
        yield axes
        for panel in axes:
            tidy(panel)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def logarithmic(axis: Any) -> None:
    """Ticks at 1, 2 and 5, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


def by_size(values: dict[str, float]) -> dict[int, float]:
    """Values by the size of a chunk, in order; the keys of JSON are text."""
    return dict(sorted((int(size), value) for size, value in values.items()))


def draw_attention(results: Results, path: Path) -> None:
    share = by_size(results["attention"]["share"])
    with picture(path) as (axes,):
        axes.plot(
            list(share), [100 * value for value in share.values()], color=LINES[0], marker="o"
        )
        axes.axvline(40, color=INK, linewidth=1, linestyle="--")
        axes.annotate("theirs, ~40", (44, 6))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set(xlabel="chunk, tokens", ylabel="rate of attention, % of its best", ylim=(0, 105))


def draw_plane(results: Results, path: Path) -> None:
    with picture(path) as (axes,):
        for (kind, label), color in zip(
            (("static", "static chunks"), ("adaptive", "adaptive chunks")),
            (LINES[1], LINES[0]),
            strict=True,
        ):
            runs = {name: run for name, run in results.items() if name.startswith(f"{kind}/")}
            tbt_ms = [1e3 * run["tbt_p99_s"] for run in runs.values()]
            ttft_s = [run["ttft_s"] for run in runs.values()]
            axes.plot(tbt_ms, ttft_s, color=color, marker="o", label=label)
        axes.set(xscale="log", ylim=(0, None), xlabel="TBT p99 of the decode, ms", ylabel="TTFT, s")
        logarithmic(axes.xaxis)
        axes.legend(frameon=False)


def draw_scaling(results: Results, path: Path) -> None:
    with picture(path, columns=2) as panels:
        for axes, (model, name) in zip(
            panels, (("llama3_8b", "Llama-3 8B"), ("llama3_70b", "Llama-3 70B")), strict=True
        ):
            for context, color in zip((M, 2 * M, 4 * M, 10 * M), LINES, strict=False):
                stages = (1, 2, 4, 8, 16)
                ttft_s = [results[f"alone/{model}/{context}/{pp}"]["ttft_s"] for pp in stages]
                gpus = [8 * pp for pp in stages]
                axes.plot(gpus, ttft_s, color=color, marker="o", label=f"{context // M}M")
                ideal = [ttft_s[0] / pp for pp in stages]
                axes.plot(gpus, ideal, color=color, linewidth=1, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.set(yscale="log", xlabel="H100 GPUs (dotted: ideal)", ylabel="TTFT, s")
            logarithmic(axes.yaxis)
            axes.set_title(name, loc="left")
            axes.legend(frameon=False, ncols=2)


def draw_groups(results: Results, path: Path) -> None:
    with picture(path) as (axes,):
        degrees = (1, 2, 4, 8)
        curves = [
            (model, name, context)
            for model, name in (("llama3_8b", "8B"), ("llama3_70b", "70B"))
            for context in (4 * M, 10 * M)
        ]
        for (model, name, context), color in zip(curves, LINES, strict=False):
            tpot = [1e3 * results[f"tpot/{model}/{context}/{kvp}"]["tpot_s"] for kvp in degrees]
            axes.plot(degrees, tpot, color=color, marker="o", label=f"{name}, {context // M}M")
        axes.plot([2], [33], color=INK, marker="x", linestyle="", label="theirs: 8B, 10M")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set(yscale="log", xlabel="KVP", ylabel="TPOT, ms")
        logarithmic(axes.yaxis)
        axes.legend(frameon=False)


def draw_mixes(results: Results, path: Path) -> None:
    with picture(path, columns=2) as panels:
        for axes, (index, name) in zip(panels, ((0, "p50"), (2, "p99")), strict=True):
            for scheduler, color in DRAWN.items():
                rates = sorted(
                    float(key.rpartition("/")[2])
                    for key in results
                    if key.startswith(f"mix/{scheduler}/")
                )
                times = [results[f"mix/{scheduler}/{r}"]["short_ttft_s"][index] for r in rates]
                axes.plot(rates, times, color=LINES[color], marker="o", label=scheduler)
            axes.set(
                yscale="log",
                xlabel="requests per second",
                ylabel=f"TTFT {name} of short requests, s",
            )
            logarithmic(axes.yaxis)
        handles, labels = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(handles, labels, frameon=False, ncols=5, loc="outside upper center")
