"""An engine of this process as a backend."""

from __future__ import annotations

import asyncio

import numpy as np

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from mnemosyne.server.backend import Job
from mnemosyne.server.embedded import EmbeddedBackend
from tests.server.conftest import open_needle

WAIT_S = 30.0


def test_a_drain_of_an_engine_here_cancels_what_is_late() -> None:
    jobs = [
        Job(job_id=str(n), prompt_ids=np.arange(3, 9), params=SamplingParams(max_tokens=n))
        for n in (3, 4000)
    ]

    async def drained(llm: LLM) -> tuple[bool, bool, list[str | None]]:
        ends: list[str | None] = []

        async def read(job: Job) -> None:
            async for event in backend.submit(job):
                ends.extend([event.finish_reason])

        async with EmbeddedBackend(llm.engine) as backend:
            await asyncio.wait_for(read(jobs[0]), WAIT_S)
            in_time = await backend.drain(0.1)
            late = asyncio.create_task(read(jobs[1]))
            while len(ends) < 6:
                await asyncio.sleep(0.01)
            is_whole = await backend.drain(0.01)
            await asyncio.wait_for(late, WAIT_S)
            while llm.engine.has_work or llm.engine.scheduler.ledger.num_used:
                await asyncio.sleep(0.01)
        return in_time, is_whole, ends

    with open_needle() as llm:
        in_time, is_whole, ends = asyncio.run(drained(llm))

    assert (in_time, is_whole) == (True, False)
    assert ends[-1] == "cancelled"
