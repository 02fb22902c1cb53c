"""Soak an engine, which must stay what it was: short requests, then streams that come and go.

First short requests, one call after another: the memory that each leaves behind and the time that
each takes, in the first quarter and in the last. Then coroutines on one AsyncEngine that read to
the end, leave early, are cancelled, cancel by id, stop reading for a while, or send what is
refused: pages, tasks, threads, descriptors and memory afterwards. Exit 1 if a bound is passed.

Usage: python tools/soak.py [--requests 20000] [--seconds 300] [--coroutines 200] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from resource import getpagesize
from typing import cast

import numpy as np

from mnemosyne import LLM, AsyncEngine, SamplingParams
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import Piece

BATCH = 16  # requests of one call
PLAIN_WORK = 200_000  # additions that take some milliseconds
MAX_SLOPE_BYTES = 1024  # of memory, by request
MAX_SLOWER = 1.25  # time per request, the last quarter beside the first
MAX_GROWTH_BYTES = 64 * 2**20  # of memory, over the streams
PROMPTS = [[5 + i, 6, 7 + i] * (1 + 3 * i) for i in range(8)]
LONG_TEXT = "the river was quiet and the light was pale " * 2000  # longer than the cache


@dataclass(slots=True)
class Requests:
    """Remains of short requests."""

    number: int
    slope_bytes: float  # of memory by request, after the first quarter
    slower: float  # a call beside plain arithmetic, in the last quarter over the first
    per_request_s: float  # of the processor
    num_pages: int  # still used

    def faults(self) -> list[str]:
        """Bounds that are passed."""
        found = []
        if self.slope_bytes > MAX_SLOPE_BYTES:
            found.append(f"memory grows by {self.slope_bytes:.0f} bytes a request")
        if self.slower > MAX_SLOWER:
            found.append(f"requests become {self.slower:.2f} times slower")
        if self.num_pages:
            found.append(f"{self.num_pages} pages are still used")
        return found


@dataclass(slots=True)
class Streams:
    """Remains of streams: differences to the time before them."""

    seconds: float
    ends: Counter[str] = field(default_factory=Counter)  # how streams ended
    num_wrong: int = 0  # read to the end, with other tokens than alone
    num_pages: int = 0
    num_streams: int = 0
    num_tasks: int = 0
    num_threads: int = 0
    num_descriptors: int = 0
    growth_bytes: int = 0  # after the first tenth of the time

    def faults(self) -> list[str]:
        """List what is not back to where it was."""
        left = {
            name: getattr(self, f"num_{name}")
            for name in ("wrong", "pages", "streams", "tasks", "threads", "descriptors")
        }
        found = [f"{number} {name}" for name, number in left.items() if number > 0]
        if self.growth_bytes > MAX_GROWTH_BYTES:
            found.append(f"memory grew by {self.growth_bytes / 2**20:.0f} MiB")
        return found


def soak_requests(llm: LLM, number: int) -> Requests:
    """Serve a number of short requests, some at a time."""
    params = SamplingParams(max_tokens=3, temperature=0.0)
    marks: list[tuple[int, int]] = []
    times_s: list[float] = []
    relative: list[float] = []
    for done in range(0, number, BATCH):
        start_s = time.process_time()
        llm.generate([PROMPTS[(done + i) % len(PROMPTS)] for i in range(BATCH)], params)
        middle_s = time.process_time()
        sum(range(PLAIN_WORK))
        # beside plain arithmetic of the same moment: a busy machine makes both slower
        times_s.append(middle_s - start_s)
        relative.append((middle_s - start_s) / (time.process_time() - middle_s))
        if done * 4 >= number:
            marks.append((done, resident_bytes()))
    quarter = max(1, len(times_s) // 4)
    x, y = np.array(marks, dtype=np.float64).T
    return Requests(
        number=number,
        slope_bytes=float(np.polyfit(x, y, 1)[0]) if len(marks) > 1 else 0.0,
        slower=float(np.median(relative[-quarter:]) / np.median(relative[:quarter])),
        per_request_s=float(np.median(times_s)) / BATCH,
        num_pages=llm.engine.scheduler.ledger.num_used,
    )


async def soak_streams(llm: LLM, *, seconds: float, coroutines: int, seed: int) -> Streams:
    """Let coroutines submit, read, leave and stop for some time, and look at what is left."""
    report = Streams(seconds)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    expected = [output.token_ids for output in llm.generate(PROMPTS, params)]
    before = _standing()
    start_s = time.monotonic()
    async with AsyncEngine(llm.engine) as engine:
        clients = [
            asyncio.create_task(
                _client(engine, random.Random(f"{seed}/{i}"), start_s + seconds, expected, report)
            )
            for i in range(coroutines)
        ]
        await asyncio.sleep(seconds / 10)
        warm_bytes = resident_bytes()
        await asyncio.gather(*clients)
        while llm.engine.has_work:  # those that were left
            await asyncio.sleep(0.01)
        report.num_streams = engine.num_streams
    gc.collect()
    report.growth_bytes = resident_bytes() - warm_bytes
    report.num_pages = llm.engine.scheduler.ledger.num_used
    after = _standing()
    # the loop itself keeps the threads of asyncio.to_thread, made to leave the engine
    ours = [t.name for t in threading.enumerate() if t.name.startswith("mnemosyne-")]
    report.num_tasks = after[0] - before[0]
    report.num_threads = len(ours)
    report.num_descriptors = after[1] - before[1]
    return report


async def _client(
    engine: AsyncEngine,
    rng: random.Random,
    end_s: float,
    expected: list[list[int]],
    report: Streams,
) -> None:
    while time.monotonic() < end_s:
        index = rng.randrange(len(PROMPTS))
        manner = rng.choice(["read", "read", "leave", "cancel", "by id", "stop", "refused"])
        if manner == "read":
            tokens = [t async for p in _stream(engine, index, 6) for t in p.token_ids]
            report.num_wrong += tokens != expected[index]
        elif manner == "leave":
            await _leave(engine, index, rng.randint(1, 4))
        elif manner == "cancel":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_leave(engine, index, 10**6), rng.random() * 0.2)
        elif manner == "by id":
            async for piece in _stream(engine, index, 300):
                engine.cancel(piece.request_id or 0)
        elif manner == "stop":
            await _stop(engine, index, min(rng.random() * 2, end_s - time.monotonic()))
        else:
            with contextlib.suppress(ValueError):
                async for _ in engine.submit(LONG_TEXT, SamplingParams()):
                    pass
        report.ends[manner] += 1


def _stream(engine: AsyncEngine, index: int, max_tokens: int) -> AsyncGenerator[Piece, None]:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return cast("AsyncGenerator[Piece, None]", engine.submit(PROMPTS[index], params))


async def _leave(engine: AsyncEngine, index: int, num_pieces: int) -> None:
    """Close a stream after some pieces."""
    async with contextlib.aclosing(_stream(engine, index, 300)) as pieces:
        async for _ in pieces:
            num_pieces -= 1
            if num_pieces == 0:
                break


async def _stop(engine: AsyncEngine, index: int, for_s: float) -> None:
    """Read one piece, then none for a while, then leave."""
    async with contextlib.aclosing(_stream(engine, index, 300)) as pieces:
        await anext(pieces)
        await asyncio.sleep(max(0.0, for_s))


def _standing() -> tuple[int, int]:
    """Tasks of the loop and descriptors of the process."""
    return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def main(words: list[str]) -> int:
    """Soak one engine both ways, print figures, return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--coroutines", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            str(write_needle(Path(folder) / "needle")),
            device="cpu",
            schedule={"chunk": 64},
            cache={"max_tokens": "16K"},
        ) as llm,
    ):
        requests = soak_requests(llm, arguments.requests)
        print(requests, *requests.faults(), sep="\n", flush=True)
        streams = asyncio.run(
            soak_streams(
                llm,
                seconds=arguments.seconds,
                coroutines=arguments.coroutines,
                seed=arguments.seed,
            )
        )
        print(streams, *streams.faults(), sep="\n")
    return len(requests.faults()) + len(streams.faults())


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
