"""Claims about the page allocator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import pages_for, slots_of


def test_a_request_gets_neighbouring_pages_where_a_run_holds_it():
    allocator = PageAllocator(10)
    first, second, third = (allocator.allocate(n) for n in (3, 2, 4))
    allocator.release(first)  # free: 0-2 and 9

    assert allocator.allocate(2).tolist() == [0, 1]
    assert allocator.num_free == 2
    assert second.tolist() == [3, 4]
    assert third.tolist() == [5, 6, 7, 8]


def test_a_fragmented_pool_still_serves_all_its_pages():
    allocator = PageAllocator(6)
    held = [allocator.allocate(1) for _ in range(6)]
    for pages in held[::2]:
        allocator.release(pages)

    assert sorted(allocator.allocate(3).tolist()) == [0, 2, 4]
    assert allocator.allocate(1) is None


def test_releasing_a_free_page_is_caught():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.release(pages)

    with pytest.raises(AssertionError, match="released"):
        allocator.release(pages)


def test_pages_of_several_runs_are_not_taken_for_neighbours():
    allocator = PageAllocator(8)
    held = [allocator.allocate(1) for _ in range(8)]
    for page in (4, 5, 2, 7):
        allocator.release(held[page])
    scattered = allocator.allocate(4)

    allocator.release(scattered)

    assert sorted(allocator.allocate(4).tolist()) == [2, 4, 5, 7]  # 6 is still in use


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=60))
def test_pages_are_never_lost_nor_given_twice(moves):
    allocator = PageAllocator(32)
    held: list[np.ndarray] = []
    for count, victim in moves:
        if victim < len(held) and count % 2:
            allocator.release(held.pop(victim))
            continue
        pages = allocator.allocate(count)
        assert (pages is None) == (count > 32 - sum(map(len, held)))
        if pages is not None:
            held.append(pages)

    used = np.concatenate([*held, np.empty(0, np.int64)])
    assert len(np.unique(used)) == len(used) == allocator.num_used
    for pages in held:
        allocator.release(pages)
    assert allocator.allocate(32).tolist() == list(range(32))


def test_slots_follow_the_page_table_beyond_31_bits():
    pages = np.array([2**26, 3, 2**40], dtype=np.int64)

    slots = slots_of(pages, start=126, num_tokens=132, page_size=128)

    assert slots[:3].tolist() == [2**26 * 128 + 126, 2**26 * 128 + 127, 3 * 128]
    assert slots[-2:].tolist() == [2**40 * 128, 2**40 * 128 + 1]
    assert pages_for(257, 128) == 3


def test_pages_are_taken_from_the_run_that_looking_at_all_of_them_finds():
    rng, allocator, held = np.random.default_rng(0), PageAllocator(300), []
    free = np.ones(300, dtype=bool)

    for _ in range(600):
        if held and rng.random() < 0.45:
            pages = held.pop(int(rng.integers(len(held))))
            allocator.release(pages)
            free[pages] = True
            continue
        count = int(rng.integers(1, 12))
        edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(int)))
        runs = [(int(stop - start), int(start)) for start, stop in edges.reshape(-1, 2)]
        fitting = [run for run in runs if run[0] >= count]
        pages = allocator.allocate(count)
        if pages is None:
            assert free.sum() < count
            continue
        if fitting:
            start = min(fitting)[1]
            assert pages.tolist() == list(range(start, start + count))
        assert free[pages].all()
        free[pages] = False
        held.append(pages)

    assert allocator.num_free == free.sum()
