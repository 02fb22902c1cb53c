"""Where the time of a step goes: parts and operators of a decode and of a prefill, and the Python.

The cache is filled with random keys and values, so that any length costs no prefill. Parts are
clocked around what computes them, without the profiler, and none counts what another within it
takes. Operators come from torch's profiler (self time), which does not see the
kernels of this project.

Usage: python tools/profile_step.py [--length 16K] [--batch 1] [--chunk 2K] [--whole]
       [--attention auto] [--operators auto] [--steps 16] [--rows 12] [--python]
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from mnemosyne.bench.peers.ours import Ours
from mnemosyne.cache.table import PageTable
from mnemosyne.config import CacheConfig, EngineConfig, ScheduleConfig, parse_size
from mnemosyne.joining.compute import Wraps
from mnemosyne.request import SamplingParams
from mnemosyne.runtime.step import Model
from mnemosyne.schedule.plan import Admission, Chunk, Plan, StepResult
from mnemosyne.schedule.predictor import REFIT_EVERY

PAGE_SIZE = 128
REQUEST = -1  # apart from those of the engine
WARM_UP = 2 * REFIT_EVERY  # steps; until then an engine without a sweep is fitted at each of them


def open_engine(arguments: argparse.Namespace, length: int, chunk: int, wraps: Wraps) -> Ours:
    """The bench model over a filled cache."""
    num_requests = arguments.batch + 1
    room = num_requests * (length + chunk + WARM_UP + 6 * arguments.steps + 2 * PAGE_SIZE)
    config = EngineConfig(
        model="bench",
        attention=arguments.attention,
        operators=arguments.operators,
        compile="none",  # a replayed step cannot be clocked
        schedule=ScheduleConfig(chunk=chunk, max_sequences=num_requests),
        cache=CacheConfig(max_tokens=room, page_size=PAGE_SIZE),
    )
    return Ours({"threads": arguments.threads, "fills": True, "engine": asdict(config)}, wraps)


def add(engine: Ours, index: int, length: int, max_tokens: int, *, is_filled: bool) -> None:
    ids = np.random.default_rng(index).integers(0, 32_000, length)
    engine.add(index, {"ids": ids, "max_tokens": max_tokens, "is_filled": is_filled})


def prefill_steps(
    engine: Ours, starts: Sequence[int], num_tokens: int
) -> list[Callable[[], object]]:
    """Steps of prefill over caches filled up to where each starts; they can be run again."""
    executor = engine.executor
    length = max(starts) + num_tokens
    num_pages = length // PAGE_SIZE + 1
    admission = Admission(
        request_id=REQUEST,
        prompt_ids=np.arange(length, dtype=np.int64) % 32_000,
        params=SamplingParams(max_tokens=1, temperature=0.0),
        seed=0,
        end_token_ids=(),
    )
    table = PageTable.on(0, np.arange(num_pages, dtype=np.int64))
    executor.submit(Plan(0, (), admitted=(admission,), tables=((REQUEST, table),)))
    executor.collect()

    def run(start: int) -> StepResult:
        executor.submit(Plan(1, (Chunk(REQUEST, start, num_tokens, samples=False),)))
        return executor.collect()

    return [partial(run, start) for start in starts]


class Clock:
    """Seconds of the parts of a step, each without the parts that run within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []  # seconds of the parts inside each one that runs

    def watched(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; every call of it counts as this part."""
        self.seconds[part] = 0.0

        def call(*arguments: Any, **keywords: Any) -> Any:
            self._within.append(0.0)
            started_s = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                took_s = time.perf_counter() - started_s
                self.seconds[part] += took_s - self._within.pop()
                if self._within:
                    self._within[-1] += took_s

        return call

    def read(self, step: Callable[[], object]) -> dict[str, float]:
        """Seconds of one call: the whole, each part, and the rest."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        started_s = time.perf_counter()
        step()
        total_s = time.perf_counter() - started_s
        rest_s = total_s - sum(self.seconds.values())
        return {"step": total_s, **self.seconds, "the rest": rest_s}


OPERATOR_PARTS = {
    "linear": "linear layers",
    "gated": "linear layers",
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "rotate": "rotation and writes",
    "angles": "rotation and writes",
    "write": "rotation and writes",
    "rotate_and_write": "rotation and writes",
    "embed": "embedding and sums",
    "add": "embedding and sums",
    "logits": "logits",
}


class Clocked:
    """Another part of an engine, some of whose methods are clocked.

    Args:
        clock: counts the seconds.
        inner: computes.
        parts: what each method counts as, by its name.
    """

    def __init__(self, clock: Clock, inner: Any, parts: Mapping[str, str]) -> None:
        self._inner = inner
        for name, part in parts.items():
            setattr(self, name, clock.watched(part, getattr(inner, name)))

    def __getattr__(self, name: str) -> Any:
        """Take an attribute that is not clocked."""
        return getattr(self._inner, name)


class ClockedModel(Clocked):
    """A model: what its layers take beside operators and attention."""

    def __call__(self, *arguments: Any) -> Any:
        """See ``Model``."""
        return self.run(*arguments)


def wraps_of(clock: Clock) -> Wraps:
    """Clocks around the parts; what they leave over is the scheduler's and the engine's."""

    def model(inner: Model) -> Model:
        clocked = ClockedModel(clock, inner, {"logits": "logits"})
        clocked.run = clock.watched("the model's Python", inner)
        return cast(Model, clocked)

    def around(parts: Mapping[str, str]) -> Any:
        return lambda inner: Clocked(clock, inner, parts)

    return Wraps(
        operators=around(OPERATOR_PARTS),
        backend=around({"attend": "attention", "prepare": "inputs and sampling"}),
        model=model,
        executor=around(dict.fromkeys(("submit", "collect"), "inputs and sampling")),
    )


def show_parts(clock: Clock, steps: Sequence[Callable[[], object]], *, add_up: bool) -> None:
    """Print the times of the parts of steps: their sums, or else medians over the steps."""
    rows = [clock.read(step) for step in steps]
    combine = sum if add_up else median
    combined_ms = {part: 1e3 * combine(row[part] for row in rows) for part in rows[0]}
    for part, ms in combined_ms.items():
        print(f"  {part:<20}{ms:12.2f} ms{100 * ms / combined_ms['step']:7.1f}%")


def show_operators(step: Callable[[], object], count: int, num_rows: int) -> None:
    """Print the operators that take most of a step."""
    if num_rows == 0:
        return
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(count):
            step()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total_ms = sum(row.self_cpu_time_total for row in rows) / count / 1e3
    print(f"  operators, with the profiler, {total_ms:.2f} ms:")
    for row in rows[:num_rows]:
        each_ms = row.self_cpu_time_total / count / 1e3
        print(f"  {row.key[:52]:<52}{each_ms:9.3f} ms {row.count / count:7.0f} calls")


def show_python(step: Callable[[], object], count: int, num_rows: int) -> None:
    """Functions by the time spent in them, cProfile's own cost included."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(count):
        step()
    profiler.disable()
    print(f"Python functions over {count} steps:")
    pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(num_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", default="16K", help="tokens in the cache of each request")
    parser.add_argument("--batch", type=int, default=1, help="decodes of a step")
    parser.add_argument("--chunk", default="2K", help="tokens of a step of prefill; 0 for none")
    parser.add_argument("--whole", action="store_true", help="prefill: all chunks of the length")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--operators", default="auto")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", action="store_true", help="functions instead of operators")
    arguments = parser.parse_args()
    length, chunk = parse_size(arguments.length), parse_size(arguments.chunk)
    if arguments.whole and chunk and length % chunk:
        parser.error(f"--length must be whole chunks with --whole, got {length} of {chunk}")
    show = show_python if arguments.python else show_operators
    clock = Clock()
    engine = open_engine(arguments, length, chunk or 2048, wraps_of(clock))
    with torch.inference_mode():
        for index in range(arguments.batch):
            add(engine, index, length, WARM_UP + 6 * arguments.steps, is_filled=True)
        for _ in range(WARM_UP):
            engine.step()
        print(f"decode of {arguments.batch} at {length:,} tokens")
        show_parts(clock, [engine.step] * arguments.steps, add_up=False)
        show(engine.step, arguments.steps, arguments.rows)
        engine.stop()
        if chunk:
            starts = range(0, length, chunk) if arguments.whole else [length]
            show_prefill(clock, engine, starts, chunk, arguments.rows)


def show_prefill(
    clock: Clock, engine: Ours, starts: Sequence[int], chunk: int, num_rows: int
) -> None:
    """Print what the chunks of a prefill take together, and the operators of the last one."""
    steps = prefill_steps(engine, starts, chunk)
    steps[0]()
    chunks = f"{len(starts)} chunks of {chunk:,}" if len(starts) > 1 else f"{chunk:,}"
    print(f"prefill of {chunks} tokens after {starts[0]:,}")
    show_parts(clock, steps, add_up=True)
    show_operators(steps[-1], 1, num_rows)


if __name__ == "__main__":
    main()
