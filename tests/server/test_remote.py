"""Jobs of a front whose engine dies: streams go on, a request that ends engines is refused."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput, SamplingParams
from mnemosyne.schedule.plan import Plan
from mnemosyne.server.backend import Event, Job
from mnemosyne.server.link import Link
from mnemosyne.server.remote import RemoteBackend
from mnemosyne.server.words import Events, Refused
from tests.engines import WrappedExecutor, open_tiny, pages_used, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint
from tests.server.fronts import MIXED, Stream, assert_same, jobs_of, read, running_front
from tests.server.in_process import InProcessEngine, InProcessRanks, front_of

T = TypeVar("T")
LONG = SamplingParams(max_tokens=900)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("remote") / "tiny")


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint, chunk=16, max_tokens=8192) as llm:
        yield llm


def run(coroutine: Awaitable[T], timeout_s: float = 100) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(coroutine, timeout_s)

    return asyncio.run(bounded())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.002)


def expected(llm: LLM, jobs: list[Job]) -> list[list[RequestOutput]]:
    outputs = llm.generate([job.prompt_ids for job in jobs], [job.params for job in jobs])
    return [output.samples or [output] for output in outputs]


def read_all(
    backend: RemoteBackend, jobs: list[Job]
) -> tuple[list[Stream], asyncio.Future[object]]:
    streams = [Stream() for _ in jobs]
    readers = (read(backend, job, stream) for job, stream in zip(jobs, streams, strict=True))
    return streams, asyncio.gather(*readers)


async def kill(backend: RemoteBackend, source: InProcessRanks) -> None:
    """Kill the engine once all jobs go on, and wait until the front has seen it."""
    await until(lambda: not backend.num_suspects)
    before = backend.status().counters["engine_deaths"]
    assert source.running is not None
    source.running.kill()
    await until(lambda: backend.status().counters["engine_deaths"] > before)


def poison_in(llm: LLM, poison: Job, at: int) -> None:
    """Have a job's prompt fail the engine when it computes output number ``at``."""
    lengths: dict[int, int] = {}

    def fail(plan: Plan) -> None:
        for admission in plan.admitted:
            num_own = len(admission.prompt_ids) - admission.num_given
            if admission.prompt_ids[:num_own].tolist() == poison.prompt_ids.tolist():
                lengths[admission.request_id] = num_own
        for chunk in plan.chunks:
            if chunk.stop >= lengths.get(chunk.request_id, chunk.stop + 1) + at:
                raise MemoryError("injected")

    WrappedExecutor(llm.engine, before=fail)


@pytest.mark.parametrize("seed", range(3))
def test_streams_of_engines_that_die_at_any_moment_end_as_if_undisturbed(
    llm: LLM, seed: int
) -> None:
    rng = random.Random(seed)
    jobs, _ = jobs_of([*MIXED, *MIXED], seed=seed)

    async def main() -> list[Stream]:
        async with front_of(llm) as (backend, source):
            streams, readers = read_all(backend, jobs)
            for _ in range(5):
                await until(lambda: not backend.num_suspects)
                goal = sum(s.num_tokens for s in streams) + rng.randrange(1, 120)
                await until(lambda goal=goal: sum(s.num_tokens for s in streams) >= goal)
                await kill(backend, source)
            await readers
            assert backend.status().counters["condemned_requests"] == 0
        return streams

    streams = run(main())

    for stream, outputs in zip(streams, expected(llm, jobs), strict=True):
        assert_same(stream, outputs)
    assert pages_used(llm.engine) == 0


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_request_that_ends_two_engines_is_refused_and_the_others_finish(
    llm: LLM, at: int
) -> None:
    jobs, _ = jobs_of(MIXED)
    outputs = expected(llm, jobs)
    bad = SamplingParams(max_tokens=20)
    (ids,) = random_prompts((30,), seed=5)
    poison = Job(job_id="poison", prompt_ids=ids, params=bad)
    poison_in(llm, poison, at)

    async def main() -> tuple[list[Stream], Stream]:
        async with front_of(llm) as (backend, source):
            streams, readers = read_all(backend, jobs)
            await until(lambda: all(s.num_tokens > 10 for s in streams))
            bad_stream = await read(backend, poison, Stream())
            await readers
            assert source.num_started == 3
            with pytest.raises(ValueError, match="ended it twice; send it again in 60 minutes"):
                await read(backend, poison, Stream())
            assert backend.status().counters["condemned_requests"] == 1
        return streams, bad_stream

    streams, bad_stream = run(main())

    assert bad_stream.ends == {0: ("error", None)}
    assert "ended the engine twice" in bad_stream.errors[0]
    for stream, wanted in zip(streams, outputs, strict=True):
        assert_same(stream, wanted)


def test_what_comes_while_there_is_no_engine_waits_for_one(llm: LLM) -> None:
    jobs, _ = jobs_of(MIXED[:2])

    async def main() -> list[Stream]:
        async with front_of(llm) as (backend, source):
            begun = Stream()
            first = asyncio.create_task(read(backend, jobs[0], begun))
            await until(lambda: begun.num_tokens > 0)
            await kill(backend, source)
            second = await read(backend, jobs[1], Stream())
            return [await first, second]

    for stream, outputs in zip(run(main()), expected(llm, jobs), strict=True):
        assert_same(stream, outputs)


def test_without_resume_streams_end_with_an_error_and_new_ones_are_served(llm: LLM) -> None:
    jobs, _ = jobs_of(MIXED[:2])

    async def main() -> tuple[Stream, Stream]:
        async with front_of(llm, resume=False) as (backend, source):
            cut = Stream()
            reader = asyncio.create_task(read(backend, jobs[0], cut))
            await until(lambda: cut.num_tokens > 5)
            await kill(backend, source)
            await reader
            return cut, await read(backend, jobs[1], Stream())

    cut, later = run(main())

    outputs = expected(llm, jobs)
    assert cut.ends == {0: ("error", None)}
    assert "the engine died" in cut.errors[0]
    assert cut.tokens[0] == outputs[0][0].token_ids[: cut.num_tokens]
    assert_same(later, outputs[1])


def test_a_reader_that_leaves_and_a_refused_job_leave_nothing(llm: LLM) -> None:
    jobs, _ = jobs_of([LONG, SamplingParams(max_tokens=3)])
    bias = SamplingParams(logit_bias={99: 1.0})
    biased = Job(job_id="biased", prompt_ids=jobs[0].prompt_ids, params=bias)

    async def main() -> Stream:
        async with front_of(llm) as (backend, _):
            async for event in backend.submit(jobs[0]):
                if event.token_ids:
                    break
            with pytest.raises(ValueError, match=r"ids in \[0, 96\), got 99"):
                await read(backend, biased, Stream())
            last = await read(backend, jobs[1], Stream())
            await until(lambda: not llm.engine.has_work)
            assert await backend.drain(1.0)
            return last

    assert run(main()).num_tokens == 3


def test_a_reader_that_is_slow_gets_the_rest_as_one_event_per_sample(llm: LLM) -> None:
    jobs, _ = jobs_of([SamplingParams(max_tokens=200, n=2, seed=1, temperature=1.0)])

    async def main() -> list[int]:
        sizes = []
        async with front_of(llm) as (backend, _):
            async for event in backend.submit(jobs[0]):
                sizes.append(len(event.token_ids))
                if len(sizes) == 8:
                    await until(lambda: not llm.engine.has_work)
                    await asyncio.sleep(0.1)  # for the last of it to come over
        return sizes

    sizes = run(main())

    assert sum(sizes) == 400
    assert len(sizes) <= 8 + 1 + 2, "one was under way, and each sample brings one more"


def test_a_drain_waits_and_cancels_what_is_late(llm: LLM) -> None:
    jobs, _ = jobs_of([SamplingParams(max_tokens=30), LONG])

    async def main() -> tuple[bool, bool, Stream]:
        async with front_of(llm) as (backend, _):
            first = asyncio.create_task(read(backend, jobs[0], Stream()))
            await until(lambda: llm.engine.has_work)
            in_time, late = await backend.drain(60.0), Stream()
            second = asyncio.create_task(read(backend, jobs[1], late))
            await until(lambda: late.num_tokens > 3)
            is_cut = not await backend.drain(0.01)
            await asyncio.gather(first, second)
            await until(lambda: not llm.engine.has_work)
            return in_time, is_cut, late

    in_time, is_cut, late = run(main())

    assert (in_time, is_cut) == (True, True)
    assert late.ends == {0: ("cancelled", None)}


def test_a_rank_that_speaks_nonsense_is_replaced(llm: LLM) -> None:
    jobs, _ = jobs_of(MIXED[:1])

    async def main() -> Stream:
        async with front_of(llm) as (backend, source):
            stream = Stream()
            reader = asyncio.create_task(read(backend, jobs[0], stream))
            await until(lambda: stream.num_tokens > 5)
            assert source.running is not None
            source.running.link._reader.feed_data(b"\xff\xff\xff\xff")
            await reader
            assert source.num_started == 2
            return stream

    assert_same(run(main()), expected(llm, jobs)[0])


def test_words_of_jobs_that_nobody_has_are_none(llm: LLM) -> None:
    jobs, _ = jobs_of(MIXED[:1])

    async def main() -> Stream:
        async with front_of(llm) as (backend, source):
            stream = Stream()
            reader = asyncio.create_task(read(backend, jobs[0], stream))
            await until(lambda: stream.num_tokens > 5)
            assert source.running is not None
            backend._take(Refused(77, "nobody asked"))
            false = [Event(sample, token_ids=(1, 2, 3)) for sample in (0, 5, -1)]
            backend._take(Events([(77, false[0]), (0, false[1]), (0, false[2])]))
            return await reader

    assert_same(run(main()), expected(llm, jobs)[0])


class NotReady:
    """A source of an engine that does not come, or comes and does not get ready."""

    def __init__(self, *, comes: bool) -> None:
        self._comes = comes
        self.is_asked, self.is_left = False, False

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[InProcessEngine]:
        self.is_asked = True
        ours, theirs = socket.socketpair()
        with theirs:
            link = await Link.over(ours)
            try:
                if not self._comes:
                    await asyncio.Event().wait()
                yield InProcessEngine(link, asyncio.ensure_future(asyncio.sleep(0, True)))
            finally:
                link.close()
                self.is_left = True


@pytest.mark.parametrize("comes", [False, True])
def test_a_front_ends_though_its_engine_is_not_ready(comes: bool) -> None:
    source = NotReady(comes=comes)

    async def main() -> None:
        async with running_front(source):
            await until(lambda: source.is_asked)

    run(main(), 20)

    assert source.is_left
