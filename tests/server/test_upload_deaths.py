"""Uploads of a prompt in pieces to an engine that dies under them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from mnemosyne.server.backend import Job
from mnemosyne.server.upload import Upload
from tests.engines import open_tiny, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint
from tests.server.fronts import Stream, assert_same, read
from tests.server.in_process import front_of
from tests.server.test_remote import expected, poison_in, run, until

PARAMS = SamplingParams(max_tokens=12, temperature=1.0, seed=4)
(PROMPT,) = random_prompts((640,), seed=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("uploads") / "tiny")


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint, chunk=16, max_tokens=8192) as llm:
        yield llm


def upload_of(
    pieces: Sequence[np.ndarray], between: Callable[[], Awaitable[Any]], *, is_whole: bool
) -> Upload:
    """An upload that waits for something before its last piece."""
    left = [b"{}\n", *(json.dumps(piece.tolist()).encode() + b"\n" for piece in pieces)]

    async def receive() -> dict[str, Any]:
        if len(left) == 1:
            await between()
        is_more = len(left) > 1 or not is_whole
        return {"type": "http.request", "body": left.pop(0), "more_body": is_more}

    return Upload(receive, 1 << 30, 100.0, lambda num_ids: None)


def test_an_upload_whose_engine_dies_goes_on_with_the_next_one(llm: LLM) -> None:
    job = Job(job_id="whole", prompt_ids=PROMPT, params=PARAMS)
    (outputs,) = expected(llm, [job])

    async def main() -> tuple[np.ndarray, Stream]:
        async with front_of(llm) as (backend, source):

            async def die() -> None:
                await until(lambda: llm.engine.has_work)
                assert source.running is not None
                source.running.kill()
                await until(lambda: source.num_started == 2)

            made = upload_of([PROMPT[:500], PROMPT[500:]], die, is_whole=True)
            await made.opening()
            ids = await made.prompt(backend, await backend.about(), PARAMS, "upload")
            return ids, await read(backend, job, Stream())

    ids, stream = run(main())

    assert np.array_equal(ids, PROMPT)
    assert_same(stream, outputs)


def test_an_upload_that_ends_engines_is_refused_while_its_end_is_not_there(llm: LLM) -> None:
    poison_in(llm, Job(job_id="poison", prompt_ids=PROMPT, params=PARAMS), 0)

    async def main() -> int:
        async with front_of(llm) as (backend, source):
            made = upload_of([PROMPT, PROMPT], asyncio.Event().wait, is_whole=False)
            await made.opening()
            with pytest.raises(RuntimeError, match="ended the engine twice"):
                await made.prompt(backend, await backend.about(), PARAMS, "upload")
            return source.num_started

    assert run(main()) == 3
