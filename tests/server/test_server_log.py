"""The log of a server has nothing of what its clients sent and were told; offline it helps."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemosyne.joining.crew import report_lost
from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from mnemosyne.schedule import prefixes
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.server.embedded import EmbeddedBackend
from tests.engines import add, drain, greedy, open_tiny, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with open_tiny(tiny_checkpoint(tmp_path / "tiny"), chunk=16) as llm:
        yield llm


def become_server(llm: LLM) -> None:
    async def main() -> None:
        async with AsyncEngine(llm.engine) as entered:
            EmbeddedBackend(llm.engine, entered)

    asyncio.run(main())


def test_outputs_of_a_lost_engine_stay_out(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    def lose() -> str:
        (output,) = llm.engine.add(random_prompts((9,))[0], SamplingParams(max_tokens=900))
        while len(output.token_ids) < 3:
            llm.engine.step()
        caplog.clear()
        report_lost(llm.engine, "killed")
        llm.engine.abort("cancelled")
        return repr(output.token_ids)

    assert lose() in caplog.text, "offline it helps"
    become_server(llm)
    assert lose() not in caplog.text
    assert "failed with 3 tokens so far" in caplog.text


def test_a_prompt_that_missed_the_cache_stays_out(
    llm: LLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "LONG_TOKENS", 20)
    caplog.set_level(logging.INFO)
    where = "differs at token 7 of 40"

    def miss(token: int) -> str:
        caplog.clear()
        add(llm.engine, [*range(10, 17), token, *range(18, 50)], greedy(1))
        drain(llm.engine)
        return f"{where}: {[token, *range(18, 41)]} where {[token - 1, *range(18, 26)]} is cached"

    miss(1)
    assert miss(2) in caplog.text, "offline it helps"
    become_server(llm)  # which knows no prefix at first
    miss(1)
    miss(2)
    assert where in caplog.text
    assert f"{where}:" not in caplog.text
