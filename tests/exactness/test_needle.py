"""The passkey is found at any depth; without the page that holds it, it is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.haystack import PASSKEY_WORDS, Recital, cycle, haystack
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import RequestOutput
from tests.engines import add, drain, greedy, pool_of, table_of

PAGE_SIZE = 128
SHORT, LONG = 4096, 2**18
DEPTHS = (0.0, 0.37, 0.75, 1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_needle(tmp_path_factory.mktemp("needle") / "needle")


def open_needle(checkpoint: Path, num_tokens: int, dtype: str, **schedule: object) -> LLM:
    """Room for two haystacks and some company, adaptive chunks unless the schedule differs.

    Nothing is shared: pages are lost here on purpose, and whole prompts computed.
    """
    cache = {"max_tokens": 2 * num_tokens + 2048, "page_size": PAGE_SIZE, "prefix": "off"}
    return LLM(str(checkpoint), dtype=dtype, device="cpu", cache=cache, schedule=schedule)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    with open_needle(checkpoint, SHORT, request.param, target_tbt=0.02) as llm:
        yield llm


def start(llm: LLM, recital: Recital) -> RequestOutput:
    return add(llm.engine, recital.prompt_ids, greedy(len(recital.answer_ids)))


def prefill_past(llm: LLM, output: RequestOutput, position: int) -> None:
    """Step until the page of a position is computed, but not the whole prompt."""
    while sum(output.metrics.chunks) < (position // PAGE_SIZE + 1) * PAGE_SIZE:
        assert output.finish_reason is None
        llm.engine.step()
    assert output.token_ids == [], "the prompt must go on after the page"


def drop_page(llm: LLM, output: RequestOutput, position: int) -> None:
    """Zero the page of a position whose tokens are computed."""
    page = position // PAGE_SIZE
    assert sum(output.metrics.chunks) >= (page + 1) * PAGE_SIZE
    (extent,) = table_of(llm, output).extents
    pool_of(llm).clear(extent.pages[page : page + 1])


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_passkey_is_found_at_every_depth_beside_short_requests(llm: LLM, depth: float) -> None:
    recitals = [haystack(SHORT, depth=depth, seed=3)]
    recitals += [cycle(name, 40) for name in ("days", "greek", "chess")]

    outputs = llm.generate(
        [recital.prompt_ids for recital in recitals], [greedy(len(r.answer_ids)) for r in recitals]
    )

    assert [o.token_ids for o in outputs] == [r.answer_ids.tolist() for r in recitals]
    assert len(outputs[0].metrics.chunks) > 1


@pytest.mark.parametrize("depth", [0.1, 0.6])
def test_without_the_page_of_the_passkey_it_is_not_found(llm: LLM, depth: float) -> None:
    recital = haystack(SHORT, depth=depth, seed=4)
    output = start(llm, recital)

    prefill_past(llm, output, recital.answer_at)
    drop_page(llm, output, recital.answer_at)
    drain(llm.engine)

    assert output.token_ids != recital.answer_ids.tolist()
    assert not set(output.token_ids) & set(recital.answer_ids[:-1].tolist())


@pytest.mark.parametrize("away", [-1, 1])
def test_without_a_page_beside_it_the_passkey_is_found(llm: LLM, away: int) -> None:
    # in the middle of its page, so that no neighbour holds a part of it
    recital = haystack(SHORT, depth=1234 / SHORT, seed=4)
    assert 32 < recital.answer_at % PAGE_SIZE < 96
    output = start(llm, recital)

    prefill_past(llm, output, recital.answer_at + PAGE_SIZE)
    drop_page(llm, output, recital.answer_at + away * PAGE_SIZE)
    drain(llm.engine)

    assert output.token_ids == recital.answer_ids.tolist()


@pytest.mark.parametrize(
    "num_tokens", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)], ids=["4K", "256K"]
)
def test_half_of_a_passkey_is_recited_before_its_page_is_lost_and_nothing_of_it_after(
    checkpoint: Path, num_tokens: int
) -> None:
    """Words after the loss are named by chance, and are the same whichever words were lost."""
    known, lost = PASSKEY_WORDS[:6], (PASSKEY_WORDS[6:12], PASSKEY_WORDS[12:18])
    recitals = [haystack(num_tokens, depth=0.4, passkey=[*known, *words], seed=5) for words in lost]
    company = cycle("zodiac", 100)
    with open_needle(checkpoint, num_tokens, "bfloat16") as llm:
        short = start(llm, company)
        outputs = []
        for recital in recitals:
            outputs.append(start(llm, recital))
            while len(outputs[-1].token_ids) < 6:
                llm.engine.step()
            drop_page(llm, outputs[-1], recital.answer_at)
            drain(llm.engine)

    assert short.token_ids == company.answer_ids.tolist()
    for recital, output in zip(recitals, outputs, strict=True):
        assert output.token_ids[:6] == recital.answer_ids[:6].tolist()
        assert output.token_ids[6] != recital.answer_ids[6]
    assert outputs[0].token_ids[6:] == outputs[1].token_ids[6:]
