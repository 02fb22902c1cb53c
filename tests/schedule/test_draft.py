"""Claims about a step while it is put together."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.draft import ChunkCandidate, StepDraft
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.work import WorkModel
from tests.schedule.clocked import make_request

SHARD = 64  # tokens of one request on a group


@pytest.mark.parametrize(
    ("num_planned", "groups", "most"),
    [(0, [0], 64), (SHARD - 1, [0], 1), (SHARD, [0, 1], 64), (2 * SHARD, [0, 1, 2], 22)],
)
def test_a_chunk_is_the_work_of_all_groups_up_to_its_own(
    num_planned: int, groups: list[int], most: int
) -> None:
    pages = np.zeros(SHARD // 16, dtype=np.int64)
    table = PageTable.spread([(group, pages) for group in range(3)], SHARD)
    request = make_request(0, 150)
    model = WorkModel([None], num_groups=3)
    step = StepDraft(model.nothing, model, lambda work: float(work.num_tokens))

    prompt = RequestState(0.0, 1.0, 1.0, 0.0, request, 1.0, table, num_planned)
    candidate = ChunkCandidate(step, prompt)
    candidate.accept(candidate.max_tokens)

    assert candidate.max_tokens == most
    assert [group for group, part in enumerate(step.work) if part.num_tokens] == groups
    assert step.seconds == most
