"""Fronts over real ranks of a tiny model, and streams whose tokens are known."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput, SamplingParams
from mnemosyne.server.backend import Event, Job
from mnemosyne.server.remote import RemoteBackend
from mnemosyne.server.sources import Source, StartedEngine, StartedRanks
from tests.engines import PAGE_SIZE, random_prompts

HOT = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 120}
MIXED = [
    SamplingParams(max_tokens=150, logprobs=2),
    SamplingParams(**HOT, seed=1, repetition_penalty=1.2),
    SamplingParams(**HOT, seed=2, n=3, logprobs=1),
    SamplingParams(**HOT, seed=3, frequency_penalty=0.3, presence_penalty=0.2, prompt_logprobs=1),
    SamplingParams(**HOT, seed=4, top_k=9, min_tokens=40, stop_token_ids=range(0, 96, 5)),
]


@dataclass(slots=True, eq=False)
class Stream:
    """Events that a reader of one job got."""

    tokens: dict[int, list[int]] = field(default_factory=dict)  # by sample
    logprobs: dict[int, list[Any]] = field(default_factory=dict)
    ends: dict[int, tuple[str, int | str | None]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    num_prompt_logprobs: int = 0

    def enter(self, event: Event) -> None:
        self.tokens.setdefault(event.sample, []).extend(event.token_ids)
        self.logprobs.setdefault(event.sample, []).extend(event.logprobs)
        if event.prompt_logprobs is not None and not self.num_prompt_logprobs:
            self.num_prompt_logprobs = len(event.prompt_logprobs)
        if event.finish_reason is not None:
            assert event.sample not in self.ends, "a sample ends once"
            self.ends[event.sample] = event.finish_reason, event.stop_reason
        if event.error is not None:
            self.errors.append(event.error)

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


class WatchedRanks(StartedRanks):
    """Ranks whose processes a test can reach."""

    running: StartedEngine | None = None
    num_started = 0

    @property
    def num_ranks(self) -> int:
        return self._world_size

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[StartedEngine]:
        async with super().engine() as engine:
            self.running, self.num_started = engine, self.num_started + 1
            yield engine

    def kill_rank(self, rank: int) -> None:
        assert self.running is not None
        process = self.running.ranks._ranks[rank]
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)


@asynccontextmanager
async def running_front(source: Source, **options: Any) -> AsyncIterator[RemoteBackend]:
    """A front that has engines of some source until it is ended in good order."""
    backend = RemoteBackend(source, **options)
    running = asyncio.create_task(backend.run())
    try:
        yield backend
        await backend.close()
        await asyncio.wait_for(running, 60)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@asynccontextmanager
async def front_over(
    command: Callable[[str], Sequence[str]], num_ranks: int, **options: Any
) -> AsyncIterator[tuple[RemoteBackend, WatchedRanks]]:
    """A front with its engine, which is ended in good order."""
    source = WatchedRanks(command, num_ranks)
    async with running_front(source, **options) as backend:
        yield backend, source
    assert source.running is not None
    assert source.running.exit_status == 0


def front(
    checkpoint: Path, axis: str = "tp", degree: int = 1
) -> AbstractAsyncContextManager[tuple[RemoteBackend, WatchedRanks]]:
    """The same over ranks of a tiny model, one of whose prompts ends them."""

    def command(link: str) -> list[str]:
        words = ["-m", "tests.server.engine_main", link, str(checkpoint), axis, str(degree)]
        return [sys.executable, *words]

    return front_over(command, degree)


async def read(backend: RemoteBackend, job: Job, stream: Stream) -> Stream:
    async for event in backend.submit(job):
        stream.enter(event)
    return stream


def jobs_of(
    params: Sequence[SamplingParams], *, seed: int = 0, first: int = 0
) -> tuple[list[Job], list[np.ndarray]]:
    """A job per parameters, prompts of 20 to 100 tokens that do not end the engine."""
    rng = np.random.default_rng(seed)
    prompts = random_prompts(rng.integers(20, 100, len(params)).tolist(), seed)
    for prompt in prompts:
        prompt[0] = 3
    return [
        Job(job_id=f"job-{first + i}", prompt_ids=prompt, params=each)
        for i, (prompt, each) in enumerate(zip(prompts, params, strict=True))
    ], prompts


def expected(checkpoint: Path, jobs: Sequence[Job]) -> list[list[RequestOutput]]:
    """Run an undisturbed engine; its tokens, per job and sample."""
    cache = {"max_tokens": 4096, "page_size": PAGE_SIZE}
    with LLM(
        str(checkpoint), dtype="float64", device="cpu", schedule={"chunk": 16}, cache=cache
    ) as llm:
        outputs = llm.generate([job.prompt_ids for job in jobs], [job.params for job in jobs])
    return [output.samples or [output] for output in outputs]


def assert_same(stream: Stream, outputs: Sequence[RequestOutput]) -> None:
    """Each token, log-probability and end is that of the undisturbed run."""
    for sample, output in enumerate(outputs):
        assert stream.tokens[sample] == output.token_ids
        assert stream.ends[sample] == (output.finish_reason, output.stop_reason)
        for one, other in zip(stream.logprobs[sample], output.logprobs or [], strict=True):
            assert (one.token_id, one.rank) == (other.token_id, other.rank)
            assert abs(one.logprob - other.logprob) < 1e-12
    assert not stream.errors
