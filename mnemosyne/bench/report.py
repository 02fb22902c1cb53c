"""The table of a comparison, with ratios, and its file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mnemosyne.bench.compare import Result, agreement
from mnemosyne.machine import num_cores, processor_name

OURS = "mnemosyne"
# A table's columns: name and digits of each number, and whether less is better.
NUMBERS = {
    "prefill_s": ("prefill, s", 2, True),
    "decode_ms": ("decode, ms/token", 2, True),
    "tokens_per_s": ("tokens/s", 1, False),
    "decoded_per_s": ("decoded meanwhile, tokens/s", 1, False),
    "gap_p95_ms": ("gap of decodes meanwhile, p95, ms", 0, True),
    "start_s": ("command to first token, s", 2, True),
}


def table(results: Sequence[Result]) -> Table:
    """Medians by case and engine; in brackets how many times as good as an engine we are."""
    engines = list(dict.fromkeys(result.engine for result in results))
    shown = Table(
        title="Medians; in brackets: how many times better mnemosyne is", title_justify="left"
    )
    for name in ("case", "", *engines):
        shown.add_column(name, justify="left" if name in ("case", "") else "right")
    for case in dict.fromkeys(result.case for result in results):
        found = {r.engine: r.medians for r in results if r.case == case}
        names = [name for name in NUMBERS if any(name in numbers for numbers in found.values())]
        for index, name in enumerate(names):
            cells = (_cell(name, found.get(engine), found.get(OURS)) for engine in engines)
            shown.add_row("" if index else case, NUMBERS[name][0], *cells)
    return shown


def ratio(name: str, ours: float, theirs: float) -> float:
    """The factor by which we are better."""
    return theirs / ours if NUMBERS[name][2] else ours / theirs


def _cell(name: str, theirs: dict[str, float] | None, ours: dict[str, float] | None) -> str:
    if theirs is None or name not in theirs:
        return "-"
    text = f"{theirs[name]:,.{NUMBERS[name][1]}f}"
    if ours is None or ours is theirs:
        return text
    return f"{text} ({ratio(name, ours[name], theirs[name]):.2f}x)"


def agreements(results: Sequence[Result]) -> list[str]:
    """One line per case that several engines computed from the same weights."""
    lines = []
    for case in dict.fromkeys(r.case for r in results):
        same = [result for result in results if result.case == case and result.token_ids]
        if len(same) > 1:
            agreed, counted = agreement(same)
            lines.append(f"{case}: the first {agreed} of {counted} greedy tokens agree")
    return lines


def write(path: Path, settings: dict[str, Any], results: Sequence[Result]) -> None:
    """Write all runs as JSON, in one piece: a run that is cut off leaves what was measured."""
    content = {
        "machine": machine(),
        "settings": settings,
        "results": [{**asdict(result), "medians": result.medians} for result in results],
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def machine() -> dict[str, Any]:
    """A description of the processor for a reader of the numbers."""
    return {"processor": processor_name(), "cores": num_cores()}


def print_table(results: Sequence[Result], console: Console) -> None:
    """Print table and agreement."""
    console.print(table(results))
    for line in agreements(results):
        console.print(line)
