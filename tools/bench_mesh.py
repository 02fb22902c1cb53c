"""Time each axis of the mesh on this machine, one thread per rank, side by side in one run.

    spp   prefill of one prompt with pp=1 and pp=2, and decode with both
    hops  decode over a filled cache with pp=1 and pp=2: what a token pays for a second stage
    slices  prefill of one prompt in one step with kvp=1 and kvp=2, whose groups share it or do not;
          --chunk adaptive for the steps that the chunk rule makes
    kvp   decode over a filled cache with kvp=1 and kvp=2: attention with merge, and whole steps
    merge time of exchange and merge by context length, with kvp=2; ranks meet before each, so that
          neither waits for the other's attention
    overlap  decode of one long request over two groups beside short ones on each, once with every
          exchange waited for at once, once with the short ones computed meanwhile
    tp    prefill and decode at short context with tp=1 and tp=2

Runs alternate and medians are shown. Ranks are started by torchrun on this machine.

Usage: python tools/bench_mesh.py spp|slices|hops|kvp|merge|overlap|tp [--repeats 3]
       [--length 32K] [--chunk SIZE] [--attention auto] [--degree 1] [--json FILE] [--trace FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mnemosyne import LLM, SamplingParams
from mnemosyne.attention import AttentionBackend
from mnemosyne.attention.kvp import Exchange, Pending, StartExchange
from mnemosyne.attention.shared_rows import SharedRows
from mnemosyne.bench.peers.ours import fill_randomly
from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.table import PageTable
from mnemosyne.config import CacheConfig, EngineConfig, MeshConfig, ScheduleConfig, parse_size
from mnemosyne.joining.compute import Wraps
from mnemosyne.joining.crew import Driver, Follower
from mnemosyne.joining.rank import build_rank
from mnemosyne.joining.real import executor_of
from mnemosyne.parallel.collectives import Gather, all_gather
from mnemosyne.parallel.mesh import Axis
from mnemosyne.schedule.plan import Admission, Chunk, Executor, Plan

WHATS = ("spp", "slices", "hops", "kvp", "merge", "overlap", "tp")
RESULT = "bench_mesh_result "  # before the line of JSON that rank 0 prints
PAGE_SIZE = 128
NUM_STEPS = 24  # decode steps timed, after NUM_WARM of them
NUM_WARM = 4
SHORT_TOKENS = 8192  # of a request beside the long one

Case = dict[str, Any]
Clocks = dict[str, list[float]]


def serve_prompt(case: Case) -> dict[str, float] | None:
    """Prefill time of one prompt and the median gap of the tokens after it, in seconds."""
    with LLM(
        "bench",
        mesh=case["mesh"],
        attention=case["attention"],
        schedule={"chunk": case["chunk"], "spread": case.get("spread", "off")},
        cache={"max_tokens": case["length"] + 4096},
        metrics={"trace": case["trace"]},
    ) as llm:
        rng = np.random.default_rng(0)
        params = SamplingParams(max_tokens=NUM_STEPS, ignore_eos=True, temperature=0.0)
        llm.generate(rng.integers(0, 32_000, 2048), params)  # warm
        output = llm.generate(rng.integers(0, 32_000, case["length"]), params)[0]
        is_driver = llm.is_driver
    assert output.metrics.ttft_s is not None
    times = {"prefill_s": output.metrics.ttft_s, "decode_s": median(output.metrics.tbt_s)}
    return times if is_driver else None


def decode_filled(case: Case) -> dict[str, float] | None:
    """Median times of a decode step over a cache that is filled with random keys and values."""
    num_groups = case["mesh"].get("kvp", 1)
    shard_tokens = pages_for(case["length"], PAGE_SIZE * num_groups) * PAGE_SIZE
    shorts = case.get("shorts", 0)  # on each group
    room = shard_tokens + PAGE_SIZE + shorts * SHORT_TOKENS
    config = EngineConfig(
        model="bench",
        attention=case["attention"],
        compile="none",  # as several ranks have it
        mesh=MeshConfig(**case["mesh"]),
        cache=CacheConfig(max_tokens=room, page_size=PAGE_SIZE),
        schedule=ScheduleConfig(chunk=512),
    )
    clocks: Clocks = {"attention_s": [], "merge_s": []}
    wraps = Wraps(
        backend=lambda inner: cast(AttentionBackend, ClockedBackend(inner, clocks)),
        exchange=lambda start: _exchange(case, start, clocks),
    )
    rank = build_rank(config, wraps=wraps)
    fill_randomly(rank.worker.pool)
    if rank.mesh.rank > 0:
        follower = Follower(rank)
        follower.close()
        return None
    driver = Driver(rank) if rank.mesh.world_size > 1 else None
    executor = executor_of(rank, driver)
    if driver is not None:
        driver.tell_ready()
    requests = [(case["length"], _table(range(num_groups), shard_tokens))]
    for index in range(shorts * num_groups):
        first = shard_tokens + PAGE_SIZE + index // num_groups * SHORT_TOKENS
        table = _table([index % num_groups], SHORT_TOKENS, first)
        requests.append((SHORT_TOKENS, table))
    times = _decode(executor, requests, clocks)
    if driver is not None:
        driver.close()
    return times


def _table(groups: Iterable[int], shard_tokens: int, first_slot: int = 0) -> PageTable:
    # decodes stay in the last shard: a long request has a page more than its share
    pages = first_slot // PAGE_SIZE + np.arange(shard_tokens // PAGE_SIZE + 1, dtype=np.int64)
    return PageTable.spread([(group, pages) for group in groups], shard_tokens)


def _decode(
    executor: Executor,
    requests: list[tuple[int, PageTable]],
    clocks: Clocks,
) -> dict[str, float]:
    starts = [length - NUM_WARM - NUM_STEPS for length, _ in requests]
    tables = tuple((request_id, table) for request_id, (_, table) in enumerate(requests))
    admitted = tuple(
        Admission(
            request_id=request_id,
            prompt_ids=np.zeros(starts[request_id], dtype=np.int64),
            params=SamplingParams(max_tokens=NUM_WARM + NUM_STEPS + 1, temperature=0.0),
            seed=0,
            end_token_ids=(),
        )
        for request_id in range(len(requests))
    )
    seconds: dict[str, list[float]] = {"step_s": [], **{name: [] for name in clocks}}
    for index in range(NUM_WARM + NUM_STEPS):
        for clock in clocks.values():
            clock.clear()
        chunks = tuple(
            Chunk(request_id, start + index, 1, samples=True, token_id=5)
            for request_id, start in enumerate(starts)
        )
        started_s = time.perf_counter()
        first = {"admitted": admitted, "tables": tables} if index == 0 else {}
        executor.submit(Plan(index, chunks, **first))
        executor.collect()
        seconds["step_s"].append(time.perf_counter() - started_s)
        for name, clock in clocks.items():
            seconds[name].append(sum(clock))
    return {name: median(values[NUM_WARM:]) for name, values in seconds.items()}


class ClockedBackend:
    """A backend of attention whose calls count as attention.

    Args:
        inner: attends.
        clocks: where seconds go.
    """

    def __init__(self, inner: AttentionBackend, clocks: Clocks) -> None:
        self._inner = inner
        self._clocks = clocks

    def attend(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        with _clocked(self._clocks["attention_s"]):
            return self._inner.attend(*arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        """Take an attribute that is not clocked."""
        return getattr(self._inner, name)


@dataclass(frozen=True, slots=True)
class ClockedExchange:
    """An exchange whose end counts as merging, and so as attention."""

    inner: Pending
    clocks: Clocks

    def finish(self, out_THD: Tensor, sink_H: Tensor | None = None) -> None:
        with _clocked(*self.clocks.values()):
            self.inner.finish(out_THD, sink_H)


def _exchange(case: Case, start: StartExchange, clocks: Clocks) -> StartExchange:
    """The start of an exchange, clocked; with ``meets`` ranks wait for each other before it, so
    that its time is its own work, with ``waits`` its messages are there before it returns."""

    def started(out_THD: Tensor, lse_TH: Tensor, shared: SharedRows, axis: Axis) -> Pending:
        if case.get("meets"):
            all_gather(torch.zeros(1), axis)
        with _clocked(*clocks.values()):
            exchange = start(out_THD, lse_TH, shared, axis)
            if case.get("waits"):
                assert isinstance(exchange, Exchange)
                gathered = exchange.gather.wait()
                exchange = replace(exchange, gather=Gather(lambda: gathered))
        return ClockedExchange(exchange, clocks)

    return started


@contextmanager
def _clocked(*seconds: list[float]) -> Iterator[None]:
    """Add the seconds that this lasts to lists."""
    started_s = time.perf_counter()
    try:
        yield
    finally:
        took_s = time.perf_counter() - started_s
        for found in seconds:
            found.append(took_s)


MEASURES: dict[str, Callable[[Case], dict[str, float] | None]] = {
    "serve": serve_prompt,
    "decode": decode_filled,
}


def cases(what: str, length: int) -> list[Case]:
    """The runs of one comparison, the first of which is what the others are measured against."""
    if what == "spp":
        fields = {"measure": "serve", "length": length, "chunk": 512}
        return [{"mesh": {"pp": pp}, **fields} for pp in (1, 2)]
    if what == "slices":
        fields = {"measure": "serve", "length": length, "chunk": length}
        spreads = [{"mesh": {"kvp": 2}, "spread": spread} for spread in ("off", "auto")]
        return [{**case, **fields} for case in ({"mesh": {"kvp": 1}}, *spreads)]
    if what == "tp":
        fields = {"measure": "serve", "length": min(length, 2048), "chunk": 512}
        return [{"mesh": {"tp": tp}, **fields} for tp in (1, 2)]
    if what in ("kvp", "hops"):
        axis = "kvp" if what == "kvp" else "pp"
        return [{"mesh": {axis: n}, "measure": "decode", "length": length} for n in (1, 2)]
    if what == "overlap":
        fields = {"mesh": {"kvp": 2}, "measure": "decode", "length": length, "shorts": 8}
        return [{**fields, "waits": waits} for waits in (True, False)]
    lengths = [2**13, 2**15, 2**17, 2**18, 2**20]
    fields = {"mesh": {"kvp": 2}, "measure": "decode", "meets": True}
    return [{**fields, "length": n} for n in lengths]


def run_case(case: Case) -> dict[str, float]:
    """Start the ranks of one case and read what rank 0 printed."""
    world_size = int(np.prod(list(case["mesh"].values())))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(world_size), __file__, "--case", json.dumps(case)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise SystemExit(f"{case} gave no result:\n{done.stderr[-3000:]}")


def compare(chosen: list[Case], repeats: int) -> list[Case]:
    """Alternate the runs of a comparison; the medians of each."""
    seconds: list[dict[str, list[float]]] = [{} for _ in chosen]
    for _ in range(repeats):
        for case, found in zip(chosen, seconds, strict=True):
            for name, value in run_case(case).items():
                found.setdefault(name, []).append(value)
    outcomes = []
    for case, found in zip(chosen, seconds, strict=True):
        medians = {name: median(values) for name, values in found.items()}
        outcomes.append({**case, **medians, "runs": found})
        first = outcomes[0]
        shown = [
            f"{name[:-2]} {1e3 * value:,.2f} ms ({first[name] / value:.2f}x)"
            for name, value in medians.items()
            if value > 0
        ]
        words = [case["mesh"], *([f"spread={case['spread']}"] if "spread" in case else [])]
        print(*words, f"{case['length']:,} tokens:", ", ".join(shown), flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=WHATS)
    parser.add_argument("--length", default=None, help="tokens; 32K, for kvp 256K")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--chunk", help="slices: as schedule.chunk; all of the prompt")
    parser.add_argument("--attention", default="auto", help="backend")
    parser.add_argument("--degree", type=int, help="run only the cases of this degree")
    parser.add_argument("--json", help="write the outcomes to this file")
    parser.add_argument(
        "--trace", help="spp, slices and tp: what ranks did when, of the last run, for Perfetto"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        torch.set_num_threads(1)
        case = json.loads(arguments.case)
        found = MEASURES[case["measure"]](case)
        if found is not None:
            print(RESULT + json.dumps(found), flush=True)
        return 0
    if arguments.what is None:
        parser.error(f"say what to compare: {', '.join(WHATS)}")
    default = "256K" if arguments.what == "kvp" else "32K"
    length = parse_size(arguments.length or default, "--length")
    common = {"attention": arguments.attention, "trace": arguments.trace}
    if arguments.chunk is not None:
        common["chunk"] = arguments.chunk
    chosen = [
        {**case, **common}
        for case in cases(arguments.what, length)
        if arguments.degree in (None, *case["mesh"].values())
    ]
    outcomes = compare(chosen, arguments.repeats)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(outcomes, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
