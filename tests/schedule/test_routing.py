"""Claims about which groups hold a request."""

from __future__ import annotations

from collections.abc import Mapping

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.routing import NOTHING, Router


class Placing:
    """A router, and a ledger that gives each request what the router chose."""

    def __init__(self, num_pages: tuple[int, ...] = (10, 10, 10)) -> None:
        self.ledger = Ledger(num_pages, page_size=4, max_tokens_per_group=32)
        self.router = Router(self.ledger)
        self._num_placed = 0

    def place(
        self, num_tokens: int, num_prompt_tokens: int, kept: Mapping[int, int] = NOTHING
    ) -> PageTable | None:
        groups = self.router.choose(num_tokens, kept=kept)
        if groups is None:
            return None
        self._num_placed += 1
        table = self.ledger.reserve(self._num_placed - 1, groups, num_tokens)
        self.router.start(table, num_prompt_tokens)
        return table

    def groups(self, *request: int, kept: Mapping[int, int] = NOTHING) -> list[int]:
        table = self.place(*request, kept=kept)
        assert table is not None
        return [extent.group for extent in table.extents]


def test_a_short_request_takes_one_group_and_a_long_one_as_many_as_it_needs():
    placing = Placing()

    assert placing.groups(32, 0) == [0]
    assert placing.groups(8, 0) == [1]
    assert placing.groups(40, 0) == [2, 1]


def test_the_group_with_the_least_pending_prefill_comes_first():
    placing = Placing()
    placing.place(20, 20)
    nearly_done = placing.place(24, 24)
    placing.router.advance(nearly_done, 0, 23)

    assert placing.groups(10, 10) == [2]
    assert placing.groups(4, 4) == [1]  # 24^2 - 23^2 < 10^2


def test_pending_prefill_ends_with_its_request():
    placing = Placing((20, 20))
    half_done = placing.place(32, 32)
    placing.router.advance(half_done, 0, 16)
    assert placing.groups(8, 8) == [1]

    placing.router.advance(half_done, 16, 32)
    placing.ledger.release(0)

    assert placing.groups(8, 8) == [0]


def test_pages_kept_for_another_are_not_given_away():
    placing = Placing((10, 10))

    assert placing.groups(16, 16, kept={0: 7}) == [1]
    assert placing.place(40, 40, kept={0: 3, 1: 0}) is None
    assert placing.ledger.num_used == 4


def test_all_pages_are_reserved_or_none():
    placing = Placing((10, 10))
    placing.place(40, 40)

    assert placing.ledger.num_used == 10
    assert placing.place(48, 48) is None  # a second full shard does not fit beside the first
    assert placing.ledger.num_used == 10
    placing.ledger.release(0)
    placing.router.clear()
    assert placing.ledger.num_used == 0
    assert placing.groups(48, 48) == [0, 1]
