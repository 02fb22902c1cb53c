"""Prompts that come in pieces: prefill begins with the first, the answer is that of the whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemosyne.llm import LLM
from mnemosyne.metrics import StepRecord
from mnemosyne.request import Piece, SamplingParams
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.serve.pieces import Gathered, gather
from mnemosyne.serve.prompt_threads import NUM_THREADS
from tests.engines import greedy, open_tiny, pages_used, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint

PROMPT = random_prompts((700,))[0]
CUTS = (0, 5, 130, 131, 400, 700)
PIECES = [PROMPT[a:b] for a, b in pairwise(CUTS)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with open_tiny(tiny_checkpoint(tmp_path_factory.mktemp("pieces") / "tiny"), chunk=64) as llm:
        yield llm


@pytest.fixture
def chunks(llm: LLM) -> Iterator[list[tuple[int, int]]]:
    """Start and length of all that is prefilled, in the order of the steps."""
    found: list[tuple[int, int]] = []

    def note(record: StepRecord) -> None:
        found.extend((start, num_tokens) for _, start, num_tokens in record.chunks)

    llm.clear_cache()
    llm.engine.on_step = note
    yield found
    llm.engine.on_step = None


def run(main: Callable[[AsyncEngine], Awaitable[Any]], llm: LLM) -> Any:
    async def entered() -> Any:
        async with AsyncEngine(llm.engine) as engine:
            return await asyncio.wait_for(main(engine), 60)

    result = asyncio.run(entered())
    assert pages_used(llm.engine) == 0
    return result


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.001)


async def collect(engine: AsyncEngine, prompt: Any, params: SamplingParams) -> list[Piece]:
    return [piece async for piece in engine.submit(prompt, params)]


async def slowly(pieces: Sequence[Any]) -> AsyncIterator[Any]:
    for piece in pieces:
        await asyncio.sleep(0.01)
        yield piece


PARAMS = [
    greedy(6),
    SamplingParams(max_tokens=8, temperature=1.0, seed=3, n=3, repetition_penalty=1.2, logprobs=2),
    SamplingParams(max_tokens=3, prompt_logprobs=2),
]


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: slowly(PIECES),
        lambda: slowly([PROMPT[:680], *PROMPT[680:].tolist()]),
        lambda: iter([PIECES[0].tolist(), PROMPT[5:]]),
        lambda: iter(PROMPT.tolist()),
    ],
)
def test_the_answer_is_that_of_the_whole_prompt(
    llm: LLM, params: SamplingParams, make: Callable[[], Any]
) -> None:
    llm.clear_cache()
    expected = run(lambda engine: collect(engine, PROMPT, params), llm)
    llm.clear_cache()

    found = run(lambda engine: collect(engine, make(), params), llm)

    for sample in range(params.n):
        ours, theirs = (
            [piece for piece in pieces if piece.sample == sample] for pieces in (found, expected)
        )
        assert tokens_of(ours) == tokens_of(theirs)
        assert ours[-1].num_prompt_tokens == len(PROMPT)
        for one, other in zip(_logprobs(ours), _logprobs(theirs), strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-12)


def tokens_of(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def _logprobs(pieces: list[Piece]) -> list[Any]:
    of_prompt = [p.prompt_logprobs[1:] for p in pieces if p.prompt_logprobs is not None]
    return [entry for entries in (*of_prompt, *(p.logprobs for p in pieces)) for entry in entries]


def test_prefill_begins_with_the_first_piece_and_nothing_is_computed_twice(
    llm: LLM, chunks: list[tuple[int, int]]
) -> None:
    async def pieces() -> AsyncIterator[np.ndarray]:
        yield PROMPT[:300]
        await until(lambda: sum(num for _, num in chunks) >= 300)
        yield PROMPT[300:680]
        await until(lambda: sum(num for _, num in chunks) >= 680)
        yield PROMPT[680:]

    async def main(engine: AsyncEngine) -> list[Piece]:
        return await collect(engine, pieces(), greedy(2))

    found = run(main, llm)

    page_size = llm.engine.scheduler.ledger.page_size
    assert found[0].num_cached >= 680 - page_size
    assert sum(num for _, num in chunks) < 700 + 3 * page_size + 2


def test_who_leaves_in_the_middle_of_a_prompt_leaves_nothing(llm: LLM) -> None:
    async def pieces() -> AsyncIterator[np.ndarray]:
        yield PROMPT[:600]
        await asyncio.Event().wait()

    async def main(engine: AsyncEngine) -> None:
        task = asyncio.create_task(collect(engine, pieces(), greedy(2)))
        await until(lambda: pages_used(llm.engine) > 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until(lambda: not llm.engine.has_work)

    run(main, llm)


def test_iterators_that_wait_hold_up_no_other_prompt(llm: LLM) -> None:
    may_end, begun = threading.Event(), threading.Semaphore(0)

    def waiting() -> Iterator[np.ndarray]:
        yield PROMPT[:20]
        begun.release()
        may_end.wait()
        yield PROMPT[20:]

    async def main(engine: AsyncEngine) -> tuple[list[Piece], list[list[Piece]]]:
        try:
            slow = [
                asyncio.create_task(collect(engine, waiting(), greedy(2)))
                for _ in range(NUM_THREADS)
            ]
            for _ in range(NUM_THREADS):
                await until(lambda: begun.acquire(blocking=False))
            other = await asyncio.wait_for(collect(engine, PROMPT, greedy(2)), 20)
        finally:
            may_end.set()
        return other, await asyncio.gather(*slow)

    other, slow = run(main, llm)

    assert all(tokens_of(each) == tokens_of(other) for each in slow)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: slowly([PROMPT[:300], [-1]]), "prompt ids must lie in"),
        (lambda: slowly([PROMPT[:300], "text"]), "prompt must be token ids"),
        (lambda: iter([PROMPT[:300], [[1, 2]]]), "prompt must be text or a flat list"),
        (lambda: iter([]), "prompt must hold at least one token"),
        (lambda: slowly([PROMPT] * 100), "must hold at most 1024 tokens, got 1400"),
    ],
)
def test_a_piece_that_is_none_is_refused_and_others_go_on(
    llm: LLM, make: Callable[[], Any], said: str
) -> None:
    async def main(engine: AsyncEngine) -> list[Any]:
        streams = [collect(engine, prompt, greedy(4)) for prompt in (make(), PROMPT)]
        return await asyncio.gather(*streams, return_exceptions=True)

    refused, other = run(main, llm)

    assert isinstance(refused, ValueError)
    assert said in str(refused)
    assert other[-1].finish_reason == "length"


def test_pieces_fit_a_limit_and_the_beginning_is_looked_up_a_few_times() -> None:
    lengths: list[int] = []

    async def prefill(ids: np.ndarray) -> None:
        lengths.append(len(ids))

    async def pieces() -> AsyncIterator[np.ndarray]:
        for start in range(0, 20_000, 10):
            yield np.arange(start, start + 10)
            await asyncio.sleep(0)

    found = asyncio.run(gather(pieces(), prefill, limit=20_000, page_size=16))

    assert found.tolist() == list(range(20_000))
    assert sum(lengths) < 40 * 20_000
    with pytest.raises(ValueError, match="must hold at most 19999 tokens, got 20000"):
        asyncio.run(gather(pieces(), prefill, limit=19_999, page_size=16))


def test_what_was_given_away_does_not_change() -> None:
    gathered = Gathered(1 << 20)
    given = []
    for start in range(0, 100_000, 1000):
        gathered.append(np.arange(start, start + 1000))
        given.append(gathered.so_far())

    assert all(np.array_equal(ids, np.arange(len(ids))) for ids in given)


def test_pieces_are_served_where_no_prefix_is_kept(tmp_path: Path) -> None:
    with LLM(
        str(tiny_checkpoint(tmp_path / "tiny")),
        dtype="float64",
        device="cpu",
        schedule={"chunk": 64},
        cache={"max_tokens": 1024, "prefix": "off"},
    ) as llm:
        expected = llm.generate(PROMPT, greedy(4))[0].token_ids

        found = run(lambda engine: collect(engine, slowly(PIECES), greedy(4)), llm)

    assert tokens_of(found) == expected
