"""``mnemosyne plan``: which layout serves a model best, in a table, a JSON file and a plot."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.table import Table

from mnemosyne.cli.shapes import calibrated, find_shape
from mnemosyne.cli.simulate import write_json
from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import PlanConfig
from mnemosyne.joining.simulated import stages_of
from mnemosyne.process import say
from mnemosyne.shape import ModelShape
from mnemosyne.simulate.planner import (
    Rank,
    Remedy,
    Verdict,
    frontier,
    plan_layouts,
    remedies,
)

OK, FAILED = 0, 2  # exit statuses
MOST_SHOWN = 10**11  # tokens; where all layers forget, memory bounds no length
SHOWN = 12  # layouts in the table
DRAWN = 6  # layouts in the plot


def plan(config: PlanConfig) -> int:
    """Judge all layouts and say which is best.

    Args:
        config: model, GPUs, hardware, length, targets.

    Returns:
        0, or 2 if no layout fits.

    Raises:
        ValueError: if something in the config cannot be used.
    """
    shape = find_shape(config.model)
    config = calibrated(config, shape)
    verdicts = plan_layouts(config, shape, stages_of)
    fits = verdicts[0].rank is Rank.FITS
    changes = [] if fits else remedies(config, shape, stages_of, verdicts)
    print_plan(config, shape, verdicts)
    if config.report:
        write_json(config.report, as_json(config, shape, verdicts, changes))
    if config.plot:
        draw_plot(config, shape, verdicts)
    if fits:
        print(f"best: {_keys(verdicts[0], config)}")
        return OK
    say(f"error: {why_nothing_fits(config, verdicts, changes)}")
    return FAILED


def print_plan(config: PlanConfig, shape: ModelShape, verdicts: list[Verdict]) -> None:
    """The table that a person reads."""
    whole = shape.kv_bytes_per_token()
    print(
        f"{config.model} on {config.gpus} {config.hardware.name}: prompts of {config.context:,} "
        f"tokens, {config.output} out, TBT at most {_ms(config.slo.tbt_s)} ms, TTFT at most "
        f"{config.slo.ttft_s:g} s; {whole:,} bytes of KV per token"
    )
    table = Table()
    table.add_column("pp kvp tp ffn")
    for column in (
        *("copies", "weights, GB", "KV/token, KB", "longest", "decodes", "TBT, ms", "TTFT, s"),
        "goodput, /min",
    ):
        table.add_column(column, justify="right")
    table.add_column("why not", overflow="fold")
    shown = [v for v in verdicts if v.rank >= Rank.NO_MEMORY][:SHOWN]
    for verdict in shown:
        table.add_row(*_cells(verdict))
    # A pipe has no width of its own, and 80 columns may cut the numbers.
    Console(width=None if sys.stdout.isatty() else 132).print(table)
    left_out = Counter(v.rank for v in verdicts if v not in shown)
    words = {
        Rank.FITS: "that fit",
        Rank.TOO_SLOW: "too slow",
        Rank.NO_MEMORY: "without the memory",
        Rank.CANNOT_CUT: "that cannot cut the model",
    }
    if left_out:
        counts = ", ".join(f"{left_out[rank]} {words[rank]}" for rank in sorted(left_out))
        print(f"not shown: {counts}")


def why_nothing_fits(config: PlanConfig, verdicts: list[Verdict], changes: list[Remedy]) -> str:
    """The reason in one line, with the smallest change that would help."""
    nearest = verdicts[0]
    reason = (
        f"a layout of {config.gpus} {config.hardware.name} must meet the targets, got none: the "
        f"nearest, {_layout(nearest.mesh)}, has {_numbers(nearest)} ({nearest.reason})"
    )
    if not changes:
        return f"{reason}; no change of gpus, context, slo.tbt or slo.ttft alone helps"
    texts = [f"{change.key}={_value(change)}" for change in changes]
    others = f" (or {', or '.join(texts[1:])})" if texts[1:] else ""
    return f"{reason}; the smallest change that fits is {texts[0]}{others}"


def as_json(
    config: PlanConfig, shape: ModelShape, verdicts: list[Verdict], changes: list[Remedy]
) -> dict[str, Any]:
    """Every layout and what was asked, as plain values; seconds, bytes, tokens."""
    rows = []
    for verdict in verdicts:
        row = asdict(verdict) | {"rank": verdict.rank.name.lower()}
        if verdict.memory is not None:
            row["memory"]["kv"] = verdict.memory.kv_bytes
        rows.append(row)
    return {
        "model": config.model,
        "hardware": config.hardware.name,
        "gpus": config.gpus,
        "context": config.context,
        "slo": asdict(config.slo),
        "kv_bytes_per_token": shape.kv_bytes_per_token(),
        "layouts": rows,
        "changes": [asdict(change) for change in changes],
    }


def draw_plot(config: PlanConfig, shape: ModelShape, verdicts: list[Verdict]) -> None:
    """TTFT against TBT of the best layouts, if matplotlib is there."""
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed; pip install matplotlib")
        return
    from mnemosyne.plot import draw_frontier

    drawn = [v for v in verdicts if v.rank >= Rank.TOO_SLOW][:DRAWN]
    assert config.plot is not None
    if not drawn:
        print("no plot: no layout has the memory")
        return
    draw_frontier(
        {_layout(v.mesh): frontier(config, shape, v, stages_of) for v in drawn},
        config.plot,
        title=f"{config.model}, {config.gpus} {config.hardware.name}, {config.context:,} tokens",
        target=(config.slo.tbt_s, config.slo.ttft_s),
    )
    print(f"plot: {config.plot}")


def _cells(verdict: Verdict) -> list[str]:
    memory = verdict.memory
    assert memory is not None
    return [
        _layout(verdict.mesh),
        str(verdict.replicas),
        f"{memory.weights / 1e9:.1f}",
        f"{memory.kv_per_token / 1e3:.1f}",
        "any" if (verdict.max_context or 0) > MOST_SHOWN else f"{verdict.max_context:,}",
        "" if verdict.decodes is None else str(verdict.decodes),
        "" if verdict.tbt_s is None else _ms(verdict.tbt_s),
        "" if verdict.ttft_s is None else f"{verdict.ttft_s:.1f}",
        f"{60 * verdict.goodput:.2f}" if verdict.rank is Rank.FITS else "",
        verdict.reason or "best",
    ]


def _layout(mesh: MeshConfig) -> str:
    return f"{mesh.pp} x {mesh.kvp} x {mesh.tp}" + (" wide" if mesh.ffn == "wide" else "")


def _numbers(verdict: Verdict) -> str:
    """The shortfall of a layout that does not fit."""
    if verdict.tbt_s is not None and verdict.ttft_s is not None:
        return f"TBT {_ms(verdict.tbt_s)} ms and TTFT {verdict.ttft_s:.1f} s"
    if verdict.max_context is not None:
        return f"room for {verdict.max_context:,} tokens"
    return "no stages"


def _keys(verdict: Verdict, config: PlanConfig) -> str:
    """The layout as keys of the other commands."""
    mesh = verdict.mesh
    words = [f"mesh.pp={mesh.pp} mesh.kvp={mesh.kvp} mesh.tp={mesh.tp}"]
    if mesh.ffn == "wide":
        words.append("mesh.ffn=wide")
    if mesh.kvp > 1:
        page = config.page_size
        tokens = -(-(config.context_tokens + config.output) // mesh.kvp)
        shard = -(-tokens // page) * page
        words.append(f"cache.max_tokens_per_group={shard}")
    words.append(f"schedule.target_tbt={config.slo.tbt_s:g}")
    copies = f", {verdict.replicas} copies" if verdict.replicas > 1 else ""
    return " ".join(words) + copies


def _value(change: Remedy) -> str:
    if change.key == "slo.tbt":
        return f"{1e3 * change.value:.1f}ms"
    if change.key == "slo.ttft":
        return f"{change.value:.1f}s"
    if change.key == "context":
        return f"{int(change.value) // 1024}K"
    return f"{change.value:g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
