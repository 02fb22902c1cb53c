"""A nan ends the request that meets it and touches no other, now or later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from tests.engines import (
    PAGE_SIZE,
    add,
    greedy,
    model_of,
    open_tiny,
    pool_of,
    random_prompts,
)
from tests.model_zoo.tiny import tiny_checkpoint

BACKENDS = ("reference", "cpu", "flex")
BROKEN = 0  # a token whose embedding is nan; padding rows hold it as well
PROMPTS = [np.where(ids == BROKEN, 1, ids) for ids in random_prompts((40, 9, 23, 90))]
BROKEN_AT = 60  # in a slot that PROMPTS[0] reserves and does not fill
BROKEN_PROMPT = np.insert(PROMPTS[3], BROKEN_AT, BROKEN)
# what a request samples is its next prompt: none may sample the token
NEVER = {BROKEN: -100.0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("broken") / "tiny")


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    """Tokens of each prompt by itself, in the whole model."""
    with open_tiny(checkpoint, chunk=64) as llm:
        params = greedy(10, logit_bias=NEVER)
        return [llm.generate(prompt, params)[0].token_ids for prompt in PROMPTS]


@pytest.fixture(params=BACKENDS)
def llm(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A model with a broken embedding, and a cache so small that its pages go round."""
    max_tokens = 12 * PAGE_SIZE
    with open_tiny(checkpoint, max_tokens=max_tokens, attention=request.param) as llm:
        model_of(llm).embed.weight[BROKEN] = torch.nan
        yield llm


def is_cache_finite(llm: LLM) -> bool:
    """Tell if all pages but the spare one, where padding goes, hold numbers."""
    pool = pool_of(llm)
    return all(bool(t[:, : pool.padding_slot].isfinite().all()) for t in (*pool.k, *pool.v))


def test_a_nan_ends_its_request_with_an_error_and_spares_the_others(
    llm: LLM, alone: list[list[int]]
) -> None:
    prompts = [PROMPTS[0], BROKEN_PROMPT, PROMPTS[1], PROMPTS[2]]

    outputs = llm.generate(prompts, greedy(10, logit_bias=NEVER))

    assert outputs[1].finish_reason == "error"
    assert "logits must be finite, got nan or inf" in outputs[1].error
    assert outputs[1].token_ids == []
    assert [outputs[i].token_ids for i in (0, 2, 3)] == alone[:3]
    assert [outputs[i].error for i in (0, 2, 3)] == [None] * 3


def test_pages_of_a_broken_request_are_cleared_before_others_use_them(
    llm: LLM, alone: list[list[int]]
) -> None:
    outputs = llm.generate([BROKEN_PROMPT] * 3, greedy(10))
    assert not is_cache_finite(llm), "the pages are free, but nobody needed them yet"

    again = llm.generate(PROMPTS[:2], greedy(10, logit_bias=NEVER))

    assert [output.finish_reason for output in outputs] == ["error"] * 3
    assert is_cache_finite(llm)
    assert [output.token_ids for output in again] == alone[:2]


def test_a_broken_request_that_is_cancelled_before_its_logits_leaves_no_nan(
    llm: LLM, alone: list[list[int]]
) -> None:
    output = add(llm.engine, BROKEN_PROMPT, greedy(10))
    while sum(output.metrics.chunks) <= BROKEN_AT:
        llm.engine.step()
    assert not is_cache_finite(llm)
    llm.engine.cancel(output.request_id)

    again = llm.generate(PROMPTS[:2], greedy(10, logit_bias=NEVER))

    assert output.finish_reason == "cancelled"
    assert is_cache_finite(llm)
    assert [output.token_ids for output in again] == alone[:2]


def test_a_broken_request_that_is_interrupted_leaves_no_nan(
    llm: LLM, alone: list[list[int]]
) -> None:
    add(llm.engine, BROKEN_PROMPT, greedy(10))
    for _ in range(10):
        llm.engine.step()
    assert not is_cache_finite(llm)
    llm.engine.abort("cancelled")

    again = llm.generate(PROMPTS[:2], greedy(10, logit_bias=NEVER))

    assert is_cache_finite(llm)
    assert [output.token_ids for output in again] == alone[:2]


def test_a_nan_that_a_request_samples_itself_ends_it_there(llm: LLM) -> None:
    params = greedy(10, logit_bias={BROKEN: 1000.0})

    broken, whole = llm.generate([PROMPTS[0], PROMPTS[1]], [params, greedy(10, logit_bias=NEVER)])

    assert broken.finish_reason == "error"
    assert broken.token_ids == [BROKEN]
    assert whole.finish_reason == "length"


def test_pages_of_a_request_that_breaks_in_its_decodes_are_cleared_as_well(
    llm: LLM, alone: list[list[int]]
) -> None:
    llm.generate(PROMPTS[0], greedy(10, logit_bias={BROKEN: 1000.0}))
    assert not is_cache_finite(llm), "the pages are free, but nobody needed them yet"

    again = llm.generate(PROMPTS[1], greedy(10, logit_bias=NEVER))  # too short to write over it

    assert is_cache_finite(llm)
    assert again[0].token_ids == alone[1]


def test_a_nan_beyond_the_window_is_cleared_though_the_request_ends_well(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "windowed", family="mistral", window=8)
    with open_tiny(path) as llm:
        model_of(llm).embed.weight[BROKEN] = torch.nan
        output = llm.generate(BROKEN_PROMPT, greedy(4, logit_bias=NEVER))[0]
        assert not is_cache_finite(llm)

        llm.generate(PROMPTS[1], greedy(1, logit_bias=NEVER))  # too short to write over it

        assert output.finish_reason == "length"
        assert is_cache_finite(llm)


def test_a_nan_that_a_ring_had_no_room_for_is_cleared_with_its_step(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "windowed", family="mistral", window=8)
    with open_tiny(path, chunk=128) as llm:
        model_of(llm).embed.weight[BROKEN] = torch.nan
        pool, end = pool_of(llm), BROKEN_AT // PAGE_SIZE
        assert pool.num_passing > end >= pool.kinds.ring(pool.kinds.windows[0])

        llm.generate(BROKEN_PROMPT, greedy(1, logit_bias=NEVER))

        first = pool.first_passing * PAGE_SIZE
        assert all(bool(t[:, first:].isfinite().all()) for t in (*pool.k, *pool.v))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_company_of_a_broken_request_samples_as_ever(llm: LLM, temperature: float) -> None:
    params = SamplingParams(
        max_tokens=6, temperature=temperature, seed=5, top_p=0.9, logprobs=2, logit_bias=NEVER
    )
    expected = llm.generate(PROMPTS[:2], params)

    outputs = llm.generate([PROMPTS[0], BROKEN_PROMPT, PROMPTS[1]], params)

    assert outputs[1].finish_reason == "error"
    assert [outputs[0].token_ids, outputs[2].token_ids] == [o.token_ids for o in expected]
    assert [entry.token_id for entry in outputs[0].logprobs] == outputs[0].token_ids
