"""Page ids of sequences lie side by side in one tensor that stays in place."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.cache.layout import LISTED_PER_PAGE
from mnemosyne.cache.page_ids import PageIds

NUM_PAGES = 3
CPU = torch.device("cpu")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 16)), max_size=60))
def test_each_sequence_finds_its_last_ids_whatever_came_and_went(
    moves: list[tuple[int, int]],
) -> None:
    page_ids, known = PageIds(NUM_PAGES, CPU), dict[int, np.ndarray]()
    address = page_ids.tensor.data_ptr()
    for index, (request_id, count) in enumerate(moves):
        page_ids.drop(request_id)
        known.pop(request_id, None)
        if count and sum(map(len, known.values())) + count <= LISTED_PER_PAGE * NUM_PAGES:
            known[request_id] = np.arange(index, index + count, dtype=np.int64)
            page_ids.enter(request_id, known[request_id])
        for each, pages in known.items():
            first = page_ids.first(each)
            assert page_ids.tensor[first : first + len(pages)].tolist() == pages.tolist()
    assert page_ids.tensor.data_ptr() == address


def test_a_table_that_changes_takes_the_place_of_the_last_one() -> None:
    page_ids = PageIds(NUM_PAGES, CPU)
    page_ids.enter(7, np.array([2, 0]))

    page_ids.enter(7, np.array([2, 0, 1]))

    first = page_ids.first(7)
    assert page_ids.tensor[first : first + 3].tolist() == [2, 0, 1]


def test_ids_of_many_sequences_are_bounded_by_the_pages_of_the_pool() -> None:
    page_ids = PageIds(80_000, CPU)  # 10M tokens

    assert page_ids.tensor.numel() * 4 <= 32 << 20  # bytes in int32
