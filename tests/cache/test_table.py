"""Each position of a request belongs to one extent, whichever way one asks."""

from __future__ import annotations

import numpy as np

from mnemosyne.cache.table import FAR, Extent, PageTable

PAGES = np.arange(2)
EQUAL = PageTable.spread([(2, PAGES), (0, PAGES), (1, PAGES)], tokens_each=5)
# the second extent takes over where the first one still holds copies
UNEVEN = PageTable((Extent(2, 0, np.arange(9)), Extent(0, 3, PAGES), Extent(1, 11, PAGES)))
LENGTH = 13


def test_equal_shards_hold_consecutive_positions_and_the_last_one_the_rest() -> None:
    held = [EQUAL.positions(index, LENGTH) for index in range(3)]

    assert held == [range(5), range(5, 10), range(10, 13)]
    assert list(EQUAL.positions(2, 7)) == []


def test_every_role_follows_from_the_starts() -> None:
    for table in (EQUAL, UNEVEN):
        starts = [extent.start for extent in table.extents]
        for stop in range(1, LENGTH + 1):
            holding = table.holding(stop)
            held = [position for _, positions in holding for position in positions]
            assert held == list(range(stop))
            assert all(held.positions for held in holding)
            assert table.num_holding(stop) == len(holding)
            assert holding[-1].extent is table.storing(stop - 1)
            assert holding[0].extent.group == table.reporter
            for group in range(4):
                local = table.held_by(group, stop)
                assert local == next((h for h in holding if h.extent.group == group), None)
        for position in range(LENGTH):
            later = [start for start in starts if start > position]
            assert table.next_start(position) == min(later, default=FAR)


def test_a_lone_extent_holds_everything() -> None:
    table = PageTable.on(3, PAGES)

    assert table.positions(0, 10**9) == range(10**9)
    assert table.next_start(10**9) == FAR
    assert table.pages_on(3) is PAGES
    assert len(table.pages_on(0)) == 0


def test_no_group_holds_anything_before_the_first_token() -> None:
    assert EQUAL.holding(0) == []
    assert EQUAL.held_by(2, 0) is None


def test_a_lane_is_one_group_alone_over_its_extent_or_copy() -> None:
    home, copy = Extent(3, 0, PAGES), Extent(1, 0, PAGES + 5)
    table = PageTable((home,), lent=(copy,))

    assert table.lane(None) is table
    for extent in (home, copy):
        lane = table.lane(extent.group)
        assert lane.reporter == extent.group
        assert [held.extent for held in lane.holding(LENGTH)] == [extent]
        assert lane.storing(LENGTH) is extent
    assert table.lanes == (home, copy)
    assert table.pages_on(1) is copy.pages


def test_a_copy_takes_no_part_in_the_roles_of_a_table() -> None:
    table = PageTable.on(3, PAGES)
    lent = PageTable(table.extents, lent=(Extent(1, 0, PAGES),))

    assert lent.reporter == 3
    assert lent.holding(LENGTH) == table.holding(LENGTH)
    assert lent.held_by(1, LENGTH) is None
