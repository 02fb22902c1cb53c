"""``mnemosyne simulate``: serve a workload on simulated hardware and print the results."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mnemosyne.cli.shapes import calibrated, find_shape
from mnemosyne.config_simulate import SimulateConfig
from mnemosyne.joining.simulated import Simulation, build_simulation
from mnemosyne.metrics import StepLog, StepRecord
from mnemosyne.process import say
from mnemosyne.simulate.hit_rates import hit_rates
from mnemosyne.simulate.report import Report, make_report, result_rows
from mnemosyne.simulate.workload import draw, read_trace, write_trace

OK = 0  # exit status


def simulate(config: SimulateConfig) -> int:
    """Run a workload and report the times of its requests.

    Args:
        config: model, hardware, layout, scheduler, workload.

    Returns:
        0.

    Raises:
        ValueError: if something in the config cannot be used.
    """
    shape = find_shape(config.model)
    config = calibrated(config, shape)
    arrivals = read_trace(config.workload.trace) if config.workload.trace else draw(config.workload)
    records: list[StepRecord] = []
    with StepLog(config.metrics.path) if config.metrics.path else nullcontext() as log:

        def record(step: StepRecord) -> None:
            records.append(step)
            if log is not None:
                log.write(step)

        is_known = all(arrival.hash_ids for arrival in arrivals)
        simulation = build_simulation(config, shape, on_step=record, shares=is_known)
        started_s = time.perf_counter()
        with misses_unsaid():
            outputs = simulation.run(arrivals)
        wall_s = time.perf_counter() - started_s
    report = make_report(arrivals, outputs, long_tokens=config.schedule.max_short_tokens)
    told = report.as_json()
    rates, page_size = None, config.cache.page_size
    if is_known:
        num_pages = config.mesh.kvp * simulation.memory.num_tokens // page_size
        rates = hit_rates(arrivals, outputs, num_pages=num_pages, page_size=page_size)
        told["hit_rates"] = rates.as_json()
    if config.output:
        write_trace(config.output, result_rows(arrivals, outputs))
    if config.report:
        write_json(config.report, told)
    print_report(report, config, simulation)
    if rates is not None:
        print(
            f"{rates.ours:.1%} of prompt tokens were cached; plain LRU by page, one request after "
            f"the other: {rates.plain_lru:.1%}; with the future known: {rates.optimum:.1%}"
        )
    say(f"{len(records):,} steps in {wall_s:.1f} s")
    if config.plot:
        draw_plot(config.plot, records, config.schedule.target_tbt_s)
    return OK


@contextmanager
def misses_unsaid() -> Iterator[None]:
    """Keep the cache miss of each long prompt out of the log: a trace has thousands."""
    logger = logging.getLogger("mnemosyne.serve.records")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def print_report(report: Report, config: SimulateConfig, simulation: Simulation) -> None:
    """The table that a person reads, times in milliseconds."""
    mesh, memory = config.mesh, simulation.memory
    print(
        f"{config.model} on {mesh.world_size} {config.hardware.name} (pp {mesh.pp}, "
        f"kvp {mesh.kvp}, tp {mesh.tp}): {memory.weights / 1e9:.1f} GB of weights a rank, cache of "
        f"{mesh.kvp * memory.num_tokens:,} tokens"
    )
    table = Table()
    for column in ("requests", "", "p50, ms", "p95, ms", "p99, ms", "on time"):
        table.add_column(column, justify="left" if column in ("requests", "") else "right")
    for kind in report.kinds:
        first = f"{kind.count} {kind.name}"
        for name, times in (("TTFT", kind.ttft_s), ("TBT", kind.tbt_s), ("TPOT", kind.tpot_s)):
            cells = [f"{1e3 * value:,.1f}" for value in times.values()]
            table.add_row(first, name, *cells, f"{kind.on_time:.0%}" if name == "TTFT" else "")
            first = ""
        table.add_section()
    # A pipe has no width of its own, and 80 columns may cut the numbers.
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    print(
        f"{report.seconds:,.0f} s simulated, {report.tokens_per_s:,.0f} tokens/s, of them "
        f"{report.output_per_s:,.0f} output tokens/s"
    )
    if report.num_refused:
        print(f"{report.num_refused} requests refused: longer than the cache")


def write_json(path: str, value: object) -> None:
    """Write a value as a JSON file.

    Raises:
        ValueError: if the file cannot be written.
    """
    try:
        Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"report must be a file that can be written, got {path!r} ({error.strerror}); "
            "name one in an existing directory"
        ) from error


def draw_plot(path: str, records: list[StepRecord], target_s: float) -> None:
    """The picture of a run, if matplotlib is there."""
    if find_spec("matplotlib") is None:
        print("no plot: matplotlib is not installed; pip install matplotlib")
        return
    from mnemosyne.plot import draw_run

    draw_run(records, path, target_s=target_s)
    print(f"plot: {path}")
