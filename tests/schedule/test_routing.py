"""Claims about which groups hold a request."""

import pytest

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import Placement
from mnemosyne.schedule.routing import Router


def _router(num_pages=(10, 10, 10), max_tokens_per_group=32) -> Router:
    allocators = [PageAllocator(count) for count in num_pages]
    return Router(allocators, page_size=4, max_tokens_per_group=max_tokens_per_group)


def _groups(placement: Placement | None) -> list[int]:
    assert placement is not None
    return [shard.group for shard in placement.shards]


def test_a_short_request_takes_one_group_and_a_long_one_as_many_as_it_needs():
    router = _router()

    assert _groups(router.place(32, 0)) == [0]
    assert _groups(router.place(8, 0)) == [1]
    assert _groups(router.place(40, 0)) == [2, 1]


def test_the_group_with_the_least_pending_prefill_comes_first():
    router = _router()
    router.place(20, 20)
    nearly_done = router.place(24, 24)
    router.advance(nearly_done, 0, 23)

    assert _groups(router.place(10, 10)) == [2]
    assert _groups(router.place(4, 4)) == [1]  # 24^2 - 23^2 < 10^2


def test_pending_prefill_ends_with_its_request():
    router = _router(num_pages=(20, 20))
    half_done = router.place(32, 32)
    router.advance(half_done, 0, 16)
    assert _groups(router.place(8, 8)) == [1]

    router.release(half_done, 32, 16)

    assert _groups(router.place(8, 8)) == [0]


def test_pages_kept_for_another_are_not_given_away():
    router = _router(num_pages=(10, 10))

    assert _groups(router.place(16, 16, kept={0: 7})) == [1]
    assert router.place(40, 40, kept={0: 3, 1: 0}) is None
    assert router.num_used == 4


def test_all_pages_are_reserved_or_none():
    router = _router(num_pages=(10, 10))
    first = router.place(40, 40)

    assert router.num_used == 10
    assert router.place(48, 48) is None  # a second full shard does not fit beside the first
    assert router.num_used == 10
    router.release(first, 40, 0)
    assert router.num_used == 0
    assert _groups(router.place(48, 48)) == [0, 1]


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
    router = _router(num_pages, max_tokens_per_group)

    assert router.max_request_tokens() == longest
    assert router.place(longest, longest) is not None


def test_positions_fall_into_shards_in_order():
    placement = _router().place(70, 70)

    assert [placement.num_active(stop) for stop in (1, 32, 33, 64, 65, 70)] == [1, 1, 2, 2, 3, 3]
    assert placement.positions(0, 40) == range(0, 32)
    assert placement.positions(1, 40) == range(32, 40)
    assert len(placement.positions(2, 40)) == 0
    assert [placement.next_boundary(position) for position in (0, 31, 32)] == [32, 32, 64]
    assert [placement.shard_in(group) for group in (0, 1, 2, 3)] == [0, 1, 2, None]


def test_the_key_that_bounds_a_request_is_named() -> None:
    assert _router((10, 10), max_tokens_per_group=40).bound_by() == "cache.max_tokens"
    assert _router((10, 10), max_tokens_per_group=36).bound_by() == "cache.max_tokens_per_group"
    assert _router((9, 10), max_tokens_per_group=36).bound_by() == "cache.max_tokens"
