"""Where the time of a step goes: operators of a decode and of a chunk of prefill, and the Python.

The cache is filled with random keys and values, so that any length costs no prefill. Operators come
from torch's profiler (self time); the time outside them is what is left of the step as the engine
measures it, without the profiler.

Usage: python tools/profile_step.py [--length 16K] [--batch 1] [--chunk 2K] [--attention auto]
       [--steps 16] [--rows 12] [--python]
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from mnemosyne.bench.peers.ours import Ours
from mnemosyne.cache.layout import Placement, Shard
from mnemosyne.config import CacheConfig, EngineConfig, ScheduleConfig, parse_size
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.request import SamplingParams
from mnemosyne.runtime import worker
from mnemosyne.schedule.plan import Admission, Chunk, Plan

PAGE_SIZE = 128
REQUEST = -1  # apart from those of the engine


def open_engine(arguments: argparse.Namespace, length: int, chunk: int) -> Ours:
    """The bench model over a filled cache."""
    num_requests = arguments.batch + 1
    room = num_requests * (length + chunk + 6 * arguments.steps + 2 * PAGE_SIZE)
    config = EngineConfig(
        model="bench",
        attention=arguments.attention,
        schedule=ScheduleConfig(chunk=chunk, max_sequences=num_requests),
        cache=CacheConfig(max_tokens=room, page_size=PAGE_SIZE),
    )
    return Ours({"threads": arguments.threads, "fills": True, "engine": asdict(config)})


def add(engine: Ours, index: int, length: int, max_tokens: int, *, is_filled: bool) -> None:
    ids = np.random.default_rng(index).integers(0, 32_000, length)
    engine.add(index, {"ids": ids, "max_tokens": max_tokens, "is_filled": is_filled})


def chunk_step(engine: Ours, start: int, num_tokens: int) -> Callable[[], object]:
    """A step of prefill over a cache that is filled up to ``start``; it can be run again."""
    executor = engine.executor
    num_pages = (start + num_tokens) // PAGE_SIZE + 1
    admission = Admission(
        request_id=REQUEST,
        prompt_ids=np.arange(start + num_tokens, dtype=np.int64) % 32_000,
        params=SamplingParams(max_tokens=1, temperature=0.0),
        seed=0,
        end_token_ids=(),
        placement=Placement((Shard(0, np.arange(num_pages, dtype=np.int64)),), 1 << 40),
    )
    chunk = Chunk(REQUEST, start, num_tokens, samples=False)
    executor.submit(Plan(0, (), admitted=(admission,)))
    executor.collect()

    def step() -> object:
        executor.submit(Plan(1, (chunk,)))
        return executor.collect()

    return step


def timed(step: Callable[[], object], count: int) -> float:
    """Median seconds of a step."""
    seconds = []
    for _ in range(count):
        started_s = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started_s)
    return median(seconds)


def clocked(owner: Any, name: str) -> list[float]:
    """Have every call of a function add its seconds to the list that comes back."""
    function, seconds = getattr(owner, name), []

    def call(*arguments: Any, **keywords: Any) -> Any:
        started_s = time.perf_counter()
        found = function(*arguments, **keywords)
        seconds.append(time.perf_counter() - started_s)
        return found

    setattr(owner, name, call)
    return seconds


def show_outside(step: Callable[[], object], count: int, clocks: dict[str, list[float]]) -> None:
    """What a step takes besides the layers, the logits and the choice of tokens."""
    rows = []
    for _ in range(count):
        for clock in clocks.values():
            clock.clear()
        started_s = time.perf_counter()
        step()
        total_s = time.perf_counter() - started_s
        parts_s = [sum(clock) for clock in clocks.values()]
        rows.append([total_s, *parts_s, total_s - sum(parts_s)])
    medians = [1e3 * median(column) for column in zip(*rows, strict=True)]
    names = ["step", *clocks, "the rest"]
    print(", ".join(f"{name} {ms:.2f} ms" for name, ms in zip(names, medians, strict=True)))


def show_operators(step: Callable[[], object], count: int, num_rows: int) -> None:
    """Time steps, then print the operators that take most of them."""
    step_s = timed(step, count)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(count):
            step()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total_ms = sum(row.self_cpu_time_total for row in rows) / count / 1e3
    print(f"step {1e3 * step_s:.2f} ms; operators, with the profiler, {total_ms:.2f} ms:")
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
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--python", action="store_true", help="functions instead of operators")
    arguments = parser.parse_args()
    length, chunk = parse_size(arguments.length), parse_size(arguments.chunk)
    show = show_python if arguments.python else show_operators
    clocks = {
        "layers": clocked(Decoder, "forward"),
        "logits": clocked(Decoder, "logits"),
        "sampling": clocked(worker, "sample"),
    }
    engine = open_engine(arguments, length, chunk or 2048)
    with torch.inference_mode():
        for index in range(arguments.batch):
            add(engine, index, length, 6 * arguments.steps, is_filled=True)
        for _ in range(3):
            engine.step()
        print(f"decode of {arguments.batch} at {length:,} tokens")
        show_outside(engine.step, arguments.steps, clocks)
        show(engine.step, arguments.steps, arguments.rows)
        engine.stop()
        if chunk:
            step = chunk_step(engine, length, chunk)
            step()
            print(f"{chunk:,} tokens of a prefill after {length:,}")
            show_operators(step, 1, arguments.rows)


if __name__ == "__main__":
    main()
