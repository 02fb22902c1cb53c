"""Each position of a request lies in one shard, whichever way one asks."""

from __future__ import annotations

import numpy as np

from mnemosyne.cache.layout import Placement, Shard

SHARDS = tuple(Shard(group, np.arange(2)) for group in (2, 0, 1))
PLACEMENT = Placement(SHARDS, shard_tokens=5)
LENGTH = 13


def test_shards_hold_consecutive_positions_and_the_last_one_the_rest() -> None:
    held = [PLACEMENT.positions(shard, LENGTH) for shard in range(3)]

    assert held == [range(5), range(5, 10), range(10, 13)]
    assert list(PLACEMENT.positions(2, 7)) == []


def test_the_next_boundary_is_the_next_position_of_another_shard() -> None:
    owner = [position // 5 for position in range(20)]

    for position in range(LENGTH):
        after = owner.index(owner[position] + 1)
        assert PLACEMENT.next_boundary(position) == after


def test_a_shard_takes_part_from_its_first_key_on() -> None:
    assert [PLACEMENT.num_active(stop) for stop in (0, 1, 5, 6, 10, 11)] == [0, 1, 1, 2, 2, 3]
    assert [PLACEMENT.shard_in(group) for group in range(4)] == [1, 2, 0, None]
