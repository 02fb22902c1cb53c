"""Claims about which groups hold a request."""

import numpy as np
import pytest

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import Placement
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.prefill import Running
from mnemosyne.schedule.routing import Router


def _router(num_pages=(10, 10, 10), max_tokens_per_group=32) -> Router:
    allocators = [PageAllocator(count) for count in num_pages]
    return Router(allocators, page_size=4, max_tokens_per_group=max_tokens_per_group)


def _running(placement: Placement, num_prompt_tokens: int, num_planned: int = 0) -> Running:
    request = Request(
        request_id=0,
        prompt_ids=np.zeros(num_prompt_tokens, dtype=np.int64),
        params=SamplingParams(),
        seed=0,
        end_token_ids=(),
        arrival_s=0.0,
    )
    return Running(request, placement, total_s=1.0, deadline_s=1.0, num_planned=num_planned)


def _groups(placement: Placement | None) -> list[int]:
    assert placement is not None
    return [shard.group for shard in placement.shards]


def test_a_short_request_takes_one_group_and_a_long_one_as_many_as_it_needs():
    router = _router()

    assert _groups(router.place(32, [])) == [0]
    assert _groups(router.place(8, [])) == [1]
    assert _groups(router.place(40, [])) == [2, 1]


def test_the_group_with_the_least_pending_prefill_comes_first():
    router = _router()
    busy = _running(router.place(20, []), num_prompt_tokens=20)
    nearly_done = _running(router.place(24, [busy]), num_prompt_tokens=24, num_planned=23)

    assert _groups(router.place(4, [busy, nearly_done])) == [2]
    idle = _running(router.place(10, [busy, nearly_done]), num_prompt_tokens=10)
    assert _groups(router.place(4, [busy, nearly_done, idle])) == [1]  # 24^2 - 23^2 < 10^2


def test_all_pages_are_reserved_or_none():
    router = _router(num_pages=(10, 10))
    first = router.place(40, [])

    assert router.num_used == 10
    assert router.place(48, []) is None  # a second full shard does not fit beside the first
    assert router.num_used == 10
    router.release(first)
    assert router.num_used == 0
    assert _groups(router.place(48, [])) == [0, 1]


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
    assert router.place(longest, []) is not None


def test_positions_fall_into_shards_in_order():
    placement = _router().place(70, [])

    assert [placement.num_active(stop) for stop in (1, 32, 33, 64, 65, 70)] == [1, 1, 2, 2, 3, 3]
    assert placement.positions(0, 40) == range(0, 32)
    assert placement.positions(1, 40) == range(32, 40)
    assert len(placement.positions(2, 40)) == 0
    assert [placement.next_boundary(position) for position in (0, 31, 32)] == [32, 32, 64]
    assert [placement.shard_in(group) for group in (0, 1, 2, 3)] == [0, 1, 2, None]
