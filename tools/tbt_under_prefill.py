"""Time between tokens of running decodes while one long prompt is prefilled.

For each target, adaptive chunks; beside them a fixed chunk. Every run is an engine of its own on
random ids: the decodes are started first, then the long prompt is added, and only gaps that end
while it is being prefilled count.

Usage: python tools/tbt_under_prefill.py [--length 32K] [--decodes 8] [--targets 0.2 0.4 0.8]
       [--fixed 2048] [--model bench] [--attention auto] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from mnemosyne import LLM, SamplingParams
from mnemosyne.config import parse_size
from mnemosyne.metrics import StepRecord, percentiles

DECODE_CONTEXT = 512  # tokens of each running decode when the long prompt arrives
MAX_TOKENS = 4096  # more than any prefill here takes steps


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. Times in seconds."""

    chunk: str
    target_s: float
    tbt_s: dict[int, float]
    within: float  # p95 TBT over the target
    num_gaps: int
    prefill_s: float
    smallest_chunk: int
    largest_chunk: int
    prediction_error: float  # median of |predicted / actual - 1| over the steps


def measure(
    model: str, attention: str, chunk: int | str, target_s: float, length: int, decodes: int
) -> Outcome:
    """Serve one long prompt beside running decodes, under one rule for the chunk."""
    rng = np.random.default_rng(0)
    records: list[StepRecord] = []
    schedule = {"chunk": chunk, "target_tbt": target_s}
    cache = {"max_tokens": length + (decodes + 1) * (DECODE_CONTEXT + MAX_TOKENS + 256)}
    with LLM(
        model, attention=attention, schedule=schedule, cache=cache, on_step=records.append
    ) as llm:
        engine = llm.engine
        engine.measure()
        params = SamplingParams(max_tokens=MAX_TOKENS, ignore_eos=True, temperature=0.0)
        running = [
            engine.add(rng.integers(0, 32_000, DECODE_CONTEXT), params)[0] for _ in range(decodes)
        ]
        while not all(len(output.token_ids) >= 8 for output in running):
            engine.step()
        before = [len(output.metrics.tbt_s) for output in running]
        records.clear()
        started_s = time.perf_counter()
        ids = rng.integers(0, 32_000, length)
        long = engine.add(ids, SamplingParams(max_tokens=1, temperature=0.0))[0]
        while long.finish_reason is None:
            engine.step()
        prefill_s = time.perf_counter() - started_s
    gaps = [gap for o, n in zip(running, before, strict=True) for gap in o.metrics.tbt_s[n:]]
    tbt_s = percentiles(gaps)
    errors = [abs(r.predicted_s / r.actual_s - 1) for r in records]
    return Outcome(
        chunk=str(chunk),
        target_s=target_s,
        tbt_s=tbt_s,
        within=tbt_s[95] / target_s,
        num_gaps=len(gaps),
        prefill_s=prefill_s,
        smallest_chunk=min(r.chunk_tokens for r in records if r.chunks),
        largest_chunk=max(r.chunk_tokens for r in records),
        prediction_error=float(np.median(errors)),
    )


def show(outcomes: Sequence[Outcome]) -> None:
    table = Table()
    for name in ("chunk", "target ms", "TBT p50", "p95", "p99", "p95/target"):
        table.add_column(name, justify="right")
    for name in ("prefill s", "chunks", "error"):
        table.add_column(name, justify="right")
    for o in outcomes:
        table.add_row(
            o.chunk,
            f"{1e3 * o.target_s:.0f}",
            *(f"{1e3 * o.tbt_s[p]:.0f}" for p in (50, 95, 99)),
            f"{o.within:.2f}",
            f"{o.prefill_s:.1f}",
            f"{o.smallest_chunk}-{o.largest_chunk}",
            f"{100 * o.prediction_error:.1f}%",
        )
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="bench")
    parser.add_argument("--attention", default="auto", help="backend")
    parser.add_argument("--length", default="32K", help="tokens of the long prompt")
    parser.add_argument("--decodes", type=int, default=8)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2, 0.4, 0.8])
    parser.add_argument("--fixed", type=int, default=2048, help="tokens; 0 leaves it out")
    parser.add_argument("--json", help="write the outcomes to this file")
    arguments = parser.parse_args()
    length = parse_size(arguments.length, "--length")
    outcomes = []
    for target_s in arguments.targets:
        for chunk in ("adaptive", *([arguments.fixed] if arguments.fixed else [])):
            served = (arguments.model, arguments.attention, chunk, target_s)
            outcomes.append(measure(*served, length, arguments.decodes))
            show(outcomes[-1:])
    show(outcomes)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(outcome) for outcome in outcomes], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
