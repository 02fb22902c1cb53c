"""Workers compute the logits of the rows that sample, and of no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from mnemosyne.cache.table import PageTable
from mnemosyne.llm import LLM
from mnemosyne.schedule.plan import Admission, Chunk, Plan
from tests.engines import add, drain, greedy, model_of, open_tiny, random_prompts, worker_of
from tests.model_zoo.tiny import tiny_checkpoint

PROMPTS = random_prompts((40, 3, 5))


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with open_tiny(tiny_checkpoint(tmp_path / "tiny")) as llm:
        yield llm


def watch_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call for logits from now on."""
    num_rows: list[int] = []
    logits = model_of(llm).logits

    def watched(hidden_BE: Tensor) -> Tensor:
        num_rows.append(len(hidden_BE))
        return logits(hidden_BE)

    monkeypatch.setattr(model_of(llm), "logits", watched)
    return num_rows


def test_only_rows_that_sample_get_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    num_rows = watch_logits(llm, monkeypatch)
    for prompt in PROMPTS[1:]:
        add(llm.engine, prompt, greedy(20))
    for _ in range(2):
        llm.engine.step()
    assert num_rows == [1, 2]  # the second prompt ends a step later

    add(llm.engine, PROMPTS[0], greedy(20))
    for _ in range(6):
        llm.engine.step()

    assert num_rows[2:] == [2] * 5 + [3]


def test_a_step_without_a_row_that_samples_asks_for_no_logits(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows = watch_logits(llm, monkeypatch)
    add(llm.engine, PROMPTS[0], greedy(1))

    for _ in range(5):
        llm.engine.step()

    assert num_rows == []


def test_a_worker_knows_the_running_requests_only(llm: LLM) -> None:
    first = add(llm.engine, PROMPTS[1], greedy(2))
    second = add(llm.engine, PROMPTS[0], greedy(2))
    llm.engine.step()
    known = set(worker_of(llm)._sequences)
    drain(llm.engine)

    third = add(llm.engine, PROMPTS[2], greedy(1))
    llm.engine.step()

    assert known == {first.request_id, second.request_id}
    assert set(worker_of(llm)._sequences) == {third.request_id}


def test_an_id_that_goes_and_comes_again_may_be_announced_ahead(llm: LLM) -> None:
    worker = worker_of(llm)
    table = PageTable.on(0, np.arange(2, dtype=np.int64))
    admission = Admission(
        request_id=-1,
        prompt_ids=np.arange(8, dtype=np.int64),
        params=greedy(2),
        seed=0,
        end_token_ids=(),
    )
    prefill = Chunk(-1, 0, 8, samples=False)
    plans = [
        Plan(0, (prefill,), admitted=(admission,), tables=((-1, table),)),
        Plan(1, (), released=(-1,)),
        Plan(0, (prefill,), admitted=(admission,), tables=((-1, table),)),
        Plan(1, (), released=(-1,)),
    ]

    for plan in plans:
        worker.expect(plan)
    known = []
    for plan in plans:
        worker.run(plan)
        known.append(set(worker._sequences))

    assert known == [{-1}, set(), {-1}, set()]
