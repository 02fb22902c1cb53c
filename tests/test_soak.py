"""The soak in its short form: what comes and goes leaves nothing, and the bounds bite."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.needle import write_needle
from tools.soak import Requests, Streams, soak_requests, soak_streams


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = write_needle(tmp_path_factory.mktemp("soak") / "needle")
    with LLM(str(model), device="cpu", schedule={"chunk": 64}, cache={"max_tokens": "16K"}) as llm:
        yield llm


def test_short_requests_leave_no_pages_and_no_memory(llm: LLM) -> None:
    report = soak_requests(llm, 640)

    assert report.num_pages == 0
    assert report.slope_bytes < 16 * 1024, "noise of so few is some MiB at most"
    assert not llm.engine.unfinished()


def test_streams_that_come_and_go_leave_nothing_behind(llm: LLM) -> None:
    report = asyncio.run(soak_streams(llm, seconds=4, coroutines=40, seed=1))

    left = [fault for fault in report.faults() if "memory" not in fault]
    assert left == []
    assert len(report.ends) == 6, "every manner of ending came up"


def test_what_is_left_behind_is_told() -> None:
    requests = Requests(9, slope_bytes=2000.0, slower=1.5, per_request_s=0.1, num_pages=3)
    streams = Streams(1.0, num_wrong=1, num_tasks=2, growth_bytes=2**30)

    assert [fault.split()[0] for fault in requests.faults()] == ["memory", "requests", "3"]
    assert streams.faults() == ["1 wrong", "2 tasks", "memory grew by 1024 MiB"]
