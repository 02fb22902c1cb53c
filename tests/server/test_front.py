"""A front over real ranks that are killed: streams end as if nothing had happened."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from mnemosyne.server.remote import RemoteBackend
from tests.model_zoo.tiny import tiny_checkpoint
from tests.server.fronts import MIXED, Stream, assert_same, expected, front, jobs_of, read

T = TypeVar("T")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("front") / "tiny", num_layers=4)


def run(coroutine: Awaitable[T], timeout_s: float = 120) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.005)


async def tokens_more(
    backend: RemoteBackend, streams: list[Stream], num_deaths: int, num_tokens: int
) -> None:
    """Wait until all streams go on after so many deaths, and then for more tokens."""

    def go_on() -> bool:
        noted = backend.status().counters["engine_deaths"] == num_deaths
        return noted and not backend.num_suspects

    await until(go_on)
    goal = sum(stream.num_tokens for stream in streams) + num_tokens
    await until(lambda: sum(stream.num_tokens for stream in streams) >= goal)


@pytest.mark.parametrize(
    ("axis", "degree", "num_kills"),
    [
        ("tp", 1, 1),
        pytest.param("tp", 2, 2, marks=pytest.mark.slow),
        pytest.param("pp", 2, 2, marks=pytest.mark.slow),
        pytest.param("kvp", 2, 2, marks=pytest.mark.slow),
    ],
)
def test_streams_of_ranks_that_are_killed_end_as_if_undisturbed(
    checkpoint: Path, axis: str, degree: int, num_kills: int
) -> None:
    jobs, _ = jobs_of([*MIXED, *MIXED])
    rng = random.Random(7)

    async def main() -> list[Stream]:
        streams = [Stream() for _ in jobs]
        async with front(checkpoint, axis, degree) as (backend, source):
            readers = [
                asyncio.create_task(read(backend, job, stream))
                for job, stream in zip(jobs, streams, strict=True)
            ]
            for kill in range(num_kills):
                await tokens_more(backend, streams, kill, rng.randrange(50, 200))
                source.kill_rank(rng.randrange(degree))
            await asyncio.gather(*readers)
            assert source.num_started == num_kills + 1
            assert backend.status().counters["engine_deaths"] == num_kills
            assert backend.status().counters["condemned_requests"] == 0
        return streams

    streams = run(main())

    for stream, outputs in zip(streams, expected(checkpoint, jobs), strict=True):
        assert_same(stream, outputs)
    assert streams[3].num_prompt_logprobs == len(jobs[3].prompt_ids)
