"""Layers that forget take the pages of their window, whatever the length of a request."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.cache.kinds import ENDLESS, PageKinds, Window
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.room import Room
from mnemosyne.schedule.routing import Router

GEMMA = [1024, 1024, 1024, 1024, 1024, None]


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ([None] * 4, ((), True)),
        ([4096] * 32, (((4096, 1),), False)),
        (GEMMA * 4, (((1024, 5),), True)),
        ([*GEMMA * 10, 1024, 1024], (((1024, 6),), True)),  # the last track is not full
        ([128, None] * 12, (((128, 1),), True)),
        ([64, 64, None, 256, 256, None], (((64, 1), (256, 1)), True)),
        ([*[None] * 21, *[1024] * 7], ((), True)),  # a track would be two thirds empty
    ],
)
def test_windows_lie_in_tracks_of_as_many_layers_as_see_everything(
    windows: list[int | None], expected: tuple[object, bool]
) -> None:
    kinds = PageKinds.of(windows, 128)

    assert (kinds.windows, kinds.keeps) == expected


def test_layers_of_a_stage_lie_in_the_tracks_of_the_whole_model() -> None:
    kinds = PageKinds.of(GEMMA * 2, 16)

    assert kinds.tracks_of(GEMMA * 2) == [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]
    assert kinds.tracks_of(GEMMA[:3]) == [1, 2, 3]
    assert [kinds.layers_per_page(part) for part in (GEMMA * 2, GEMMA, GEMMA[:3])] == [2, 1, 1]


@given(st.integers(1, 300), st.integers(1, 70), st.integers(0, 2000), st.integers(1, 500))
def test_a_ring_has_the_pages_that_a_row_sees_and_those_of_a_page_more(
    size: int, page_size: int, start: int, num_tokens: int
) -> None:
    ring = PageKinds(page_size).ring(Window(size, 1))
    first = max(0, start - size + 1) // page_size
    last = (start + min(num_tokens, page_size) - 1) // page_size

    assert last - first + 1 <= ring


@pytest.mark.parametrize("windows", [GEMMA, [1024] * 4, [None] * 3])
def test_the_longest_request_is_the_longest_that_the_pages_hold(windows: list[int | None]) -> None:
    kinds = PageKinds.of(windows, 16)
    for num_pages in (0, 7, 40, 400, 4000):
        most = kinds.most_tokens(num_pages)

        assert kinds.pages(most) <= num_pages
        assert most == ENDLESS or kinds.pages(most + 1) > num_pages


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("length", [32 << 10, 128 << 10])
def test_a_cache_holds_as_many_tokens_as_layers_window_and_pages_give(
    length: int, num_groups: int
) -> None:
    kinds, page_size = PageKinds.of(GEMMA * 8, 128), 128
    per_group = length // num_groups
    ledger = Ledger(
        [160 * length // page_size // num_groups] * num_groups,
        page_size=page_size,
        max_tokens_per_group=per_group,
        kinds=kinds,
    )
    router = Router(ledger)

    for holder in count():
        places = router.choose(length)
        if places is None:
            break
        router.start(ledger.reserve(holder, places, length), length)

    # bytes of a layer's page: all tokens in one layer of six, a window in five
    exact = length // page_size + 5 * (1024 // page_size + 1)
    assert holder >= 0.95 * ledger.num_pages / exact
    assert holder >= Room(ledger.group_pages, kinds, per_group).most_requests(length)
    assert holder > 4 * ledger.num_pages // (6 * length // page_size)  # if each kept every key


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=60))
def test_no_page_is_given_twice_and_all_come_back(moves: list[tuple[bool, int]]) -> None:
    kinds = PageKinds.of([24, 24, 24, None], 4)
    ledger = Ledger([120, 120], page_size=4, max_tokens_per_group=80, kinds=kinds)
    router, held = Router(ledger), list[int]()
    for holder, (starts, length) in enumerate(moves):
        places = router.choose(length) if starts and len(ledger.shard_needs(length)) <= 2 else None
        if places is not None:
            ledger.reserve(holder, places, length)
            held.append(holder)
        elif held and starts:
            ledger.grow(held[length % len(held)])
        elif held:
            ledger.release(held.pop(length % len(held)))
        for group in ledger.groups:
            tables = [ledger.table_of(each) for each in held]
            used = [table.pages_on(group) for table in tables]
            used += [ring.ravel() for table in tables for ring in table.rings_on(group)]
            pages = np.concatenate([np.empty(0, dtype=np.int64), *used])
            assert len(np.unique(pages)) == len(pages) == 120 - ledger.num_free(group)
    for holder in held:
        ledger.release(holder)

    assert ledger.num_used == 0


def test_a_request_grows_in_every_track_until_its_rings_are_whole() -> None:
    kinds = PageKinds.of([8, 8, None], 4)  # rings of four pages in two tracks
    ledger = Ledger([30], page_size=4, max_tokens_per_group=400, kinds=kinds)
    router = Router(ledger)
    places = router.choose(4)
    assert places is not None
    table = ledger.reserve(0, places, 4)
    used = [ledger.num_used]

    for position in range(4, 20, 4):
        assert not ledger.has_room(table, position)
        grown = ledger.grow(0)
        assert grown is not None
        assert ledger.has_room(grown, position)
        table = grown
        used.append(ledger.num_used)

    assert used == [3, 6, 9, 12, 13]
