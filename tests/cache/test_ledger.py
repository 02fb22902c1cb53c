"""Pages have an owner or none: nothing is freed twice, given twice or lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place


def make_ledger(*num_pages: int, max_tokens_per_group: int = 32) -> Ledger:
    return Ledger(num_pages, page_size=4, max_tokens_per_group=max_tokens_per_group)


def places(*groups: int) -> list[Place]:
    return [Place(group) for group in groups]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 60)), max_size=40))
def test_pages_are_never_lost_nor_given_twice(moves: list[tuple[int, int]]) -> None:
    ledger, tables = make_ledger(9, 9, 9), {}
    for holder, num_tokens in moves:
        if tables.pop(holder, None) is not None:
            ledger.release(holder)
        sizes = ledger.shard_pages(num_tokens)
        if all(ledger.num_free(group) >= size for group, size in enumerate(sizes)):
            tables[holder] = ledger.reserve(holder, places(*range(len(sizes))), num_tokens)
        for group in ledger.groups:
            held = [page for table in tables.values() for page in table.pages_on(group)]
            assert len(held) == len(set(held)) == 9 - ledger.num_free(group)


def test_what_a_holder_gave_back_it_cannot_give_back_again() -> None:
    ledger = make_ledger(10)
    ledger.reserve(1, places(0), 8)
    ledger.release(1)

    with pytest.raises(KeyError):
        ledger.release(1)


def test_a_holder_cannot_lose_pages_by_reserving_twice() -> None:
    ledger = make_ledger(10)
    ledger.reserve(1, places(0), 8)

    with pytest.raises(AssertionError, match="has pages"):
        ledger.reserve(1, places(0), 8)


def test_a_reset_takes_all_pages_back() -> None:
    ledger = make_ledger(10, 10)
    ledger.reserve(1, places(0, 1), 40)

    ledger.reset()

    assert ledger.num_used == 0
    assert ledger.num_listable(0) == 32 * 10
    assert len(ledger.reserve(1, places(1), 32).pages_on(1)) == 8


@pytest.mark.parametrize(
    ("num_pages", "max_tokens_per_group", "longest"),
    [
        ((10,), 40, 40),
        ((10, 10, 10), 32, 96),
        ((10, 10, 3), 32, 64 + 12),
        ((3, 3), 32, 12),  # no shard can be full, so none can be followed by another
    ],
)
def test_the_longest_request_is_what_empty_groups_hold(num_pages, max_tokens_per_group, longest):
    ledger = make_ledger(*num_pages, max_tokens_per_group=max_tokens_per_group)

    assert ledger.max_request_tokens() == longest
    table = ledger.reserve(0, places(*range(len(ledger.shard_pages(longest)))), longest)
    assert sum(len(extent.pages) for extent in table.extents) == -(-longest // 4)
    assert np.diff([extent.start for extent in table.extents]).tolist() == [
        max_tokens_per_group
    ] * (len(table.extents) - 1)


def test_the_key_that_bounds_a_request_is_named() -> None:
    assert make_ledger(10, 10, max_tokens_per_group=40).bound_by() == "cache.max_tokens"
    assert make_ledger(10, 10, max_tokens_per_group=36).bound_by() == "cache.max_tokens_per_group"
    assert make_ledger(9, 10, max_tokens_per_group=36).bound_by() == "cache.max_tokens"


def test_a_table_grows_by_a_page_and_gives_all_of_them_back() -> None:
    ledger = make_ledger(10, 10, max_tokens_per_group=20)
    for holder in range(3):
        ledger.reserve(holder, places(0), 8)
    grown = [ledger.grow(holder) for holder in (0, 1, 2, 0)]

    assert grown[:2] + grown[3:] != [None] * 3
    for holder in range(3):
        ledger.release(holder)
    assert ledger.num_used == 0
    assert ledger.reserve(9, places(0, 1), 40) is not None


def test_a_full_group_is_followed_by_another_and_the_last_by_none() -> None:
    ledger = make_ledger(2, 2, max_tokens_per_group=8)
    ledger.reserve(0, places(1), 8)

    table = ledger.grow(0)

    assert table is not None
    assert [(e.group, e.start, len(e.pages)) for e in table.extents] == [(1, 0, 2), (0, 8, 1)]
    assert ledger.grow(0) is not None
    assert ledger.grow(0) is None
