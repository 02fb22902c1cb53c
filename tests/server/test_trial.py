"""Innocents beside a request that ends engines: none is refused, however long its own prefill."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from mnemosyne.server import remote
from mnemosyne.server.backend import Job
from mnemosyne.server.task import Task
from mnemosyne.server.trial import judge
from tests.engines import open_tiny, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint
from tests.server.fronts import MIXED, Stream, assert_same, read
from tests.server.in_process import front_of
from tests.server.test_remote import expected, poison_in, read_all, run, until

LENGTHS = (700, 800, 900)  # of prompts: many steps each


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("trial") / "tiny")


@pytest.fixture
def llm(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """An engine to which what is new comes at once, beside those who are tried."""
    monkeypatch.setattr(remote, "TRIAL_S", 0.0)
    with open_tiny(checkpoint, chunk=32, max_tokens=8192) as llm:
        yield llm


def innocents() -> list[Job]:
    prompts = random_prompts(LENGTHS, seed=9)
    return [
        Job(job_id=f"innocent-{i}", prompt_ids=ids, params=replace(params, max_tokens=40))
        for i, (ids, params) in enumerate(zip(prompts, MIXED[1:4], strict=True))
    ]


def poison_of(length: int) -> Job:
    (ids,) = random_prompts((length,), seed=5)
    return Job(job_id="poison", prompt_ids=ids, params=SamplingParams(max_tokens=20))


def test_those_whose_prefill_is_long_are_tried_one_by_one(llm: LLM) -> None:
    jobs, poison = innocents(), poison_of(650)
    outputs = expected(llm, jobs)
    poison_in(llm, poison, 0)

    async def main() -> tuple[list[Stream], Stream]:
        async with front_of(llm) as (backend, source):
            (*streams, bad), readers = read_all(backend, [*jobs, poison])
            await readers
            assert backend.status().counters["condemned_requests"] == 1
            assert source.num_started == 3
        return streams, bad

    streams, bad = run(main())

    assert "ended the engine twice" in bad.errors[0]
    for stream, wanted in zip(streams, outputs, strict=True):
        assert_same(stream, wanted)


def test_a_poison_that_comes_during_a_trial_does_not_condemn_who_is_tried(llm: LLM) -> None:
    jobs, poison = innocents(), poison_of(40)
    outputs = expected(llm, jobs)
    poison_in(llm, poison, 1)

    async def main() -> tuple[list[Stream], Stream]:
        async with front_of(llm) as (backend, source):
            streams, readers = read_all(backend, jobs)
            await until(
                lambda: llm.engine.scheduler.num_running == sum(job.params.n for job in jobs)
            )
            assert source.running is not None
            source.running.kill()
            await until(lambda: source.num_started == 2 and llm.engine.has_work)
            bad = await read(backend, poison, Stream())
            await readers
            assert backend.status().counters["condemned_requests"] == 1
        return streams, bad

    streams, bad = run(main())

    assert "ended the engine twice" in bad.errors[0]
    for stream, wanted in zip(streams, outputs, strict=True):
        assert_same(stream, wanted)


def test_a_death_counts_for_a_suspect_only_if_nobody_else_could_be_the_cause() -> None:
    async def judged() -> None:
        suspect, proved, fresh = (
            Task(number, job, job.params) for number, job in enumerate(innocents()[:3])
        )
        assert not judge([suspect]), "of those who were there once, all are suspects"
        proved.further.set()

        assert judge([suspect, proved, fresh])
        assert [task.num_deaths for task in (suspect, proved, fresh)] == [1, 1, 1]

        proved.further.set()
        assert not judge([suspect, proved])
        assert suspect.num_deaths == 2

    asyncio.run(judged())
