"""Kill ranks in the middle of streams: each must end with the tokens of a quiet run.

Ranks of ``mnemosyne serve`` run behind a front, on one process, tp=2, pp=2 and kvp=2 in turn. Ten
streams (several samples, log-probabilities, penalties, end tokens among them) run in float64; at a
random moment a random rank is killed with SIGKILL; all streams must go on in the ranks that take
their place. Exit 1 if a token, a log-probability or an end differs, or a stream does not end.

Usage: python -m tools.kill_ranks [--kills 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from mnemosyne.request import RequestOutput
from mnemosyne.server.backend import Job
from mnemosyne.server.remote import RemoteBackend
from tests.model_zoo.tiny import tiny_checkpoint
from tests.server.fronts import (
    MIXED,
    Stream,
    WatchedRanks,
    assert_same,
    expected,
    front_over,
    jobs_of,
    read,
)

LAYOUTS = ((), ("mesh.tp=2",), ("mesh.pp=2",), ("mesh.kvp=2", "cache.max_tokens_per_group=128"))
MODEL = ("dtype=float64", "device=cpu", "schedule.chunk=16", "cache.max_tokens=8192")
LIMIT_S = 600.0  # for the streams of one kill


async def kill_once(
    backend: RemoteBackend, source: WatchedRanks, jobs: Sequence[Job], rng: random.Random
) -> tuple[list[Stream], str]:
    """Run streams, kill a rank among them, and wait for all."""
    streams = [Stream() for _ in jobs]
    readers = [
        asyncio.create_task(read(backend, job, stream))
        for job, stream in zip(jobs, streams, strict=True)
    ]
    while not backend.status().is_ready:
        await asyncio.sleep(0.01)
    goal = rng.randrange(0, 900)
    while sum(stream.num_tokens for stream in streams) < goal:
        await asyncio.sleep(0.002)
    assert source.running is not None
    victim, began_s = rng.randrange(source.num_ranks), time.monotonic()
    had = sum(stream.num_tokens for stream in streams)
    num_open = sum(not reader.done() for reader in readers)
    source.kill_rank(victim)
    await asyncio.wait_for(asyncio.gather(*readers), LIMIT_S)
    seconds = time.monotonic() - began_s
    return streams, f"rank {victim} at {had} tokens, {num_open} streams open, {seconds:.1f} s more"


def differences(streams: Sequence[Stream], outputs: Sequence[Sequence[RequestOutput]]) -> int:
    """The number of streams that differ from those of a quiet run."""
    count = 0
    for stream, wanted in zip(streams, outputs, strict=True):
        try:
            assert_same(stream, wanted)
        except (AssertionError, KeyError):
            count += 1
    return count


async def run_layout(path: Path, layout: Sequence[str], num_kills: int, rng: random.Random) -> int:
    """Kill ranks of one layout; how many streams differ."""
    words = ["-m", "mnemosyne", "serve", f"model={path}", *MODEL, "cache.page_size=16", *layout]
    size = 2 if layout else 1
    faults = 0
    async with front_over(lambda link: [sys.executable, *words, f"serve.link={link}"], size) as (
        backend,
        source,
    ):
        for number in range(num_kills):
            jobs, _ = jobs_of([*MIXED, *MIXED], seed=rng.randrange(2**20))
            streams, said = await kill_once(backend, source, jobs, rng)
            wrong = differences(streams, await asyncio.to_thread(expected, path, jobs))
            faults += wrong
            same = f"{len(streams) - wrong} of {len(streams)} streams as undisturbed"
            place = " ".join(layout) or "one process"
            print(f"{place}: kill {number + 1}: {said}; {same}", flush=True)
        deaths = backend.status().counters["engine_deaths"]
        refused = backend.status().counters["condemned_requests"]
    if deaths != num_kills or refused:
        print(f"{deaths} deaths for {num_kills} kills, {refused} requests refused")
        faults += 1
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, faults = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory(prefix="mnemosyne-") as folder:
        path = tiny_checkpoint(Path(folder) / "tiny", num_layers=4)
        for index, layout in enumerate(LAYOUTS):
            num_kills = len(range(index, arguments.kills, len(LAYOUTS)))
            if num_kills:
                faults += asyncio.run(run_layout(path, layout, num_kills, rng))
    print("all streams ended as undisturbed" if not faults else f"{faults} streams differ")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
