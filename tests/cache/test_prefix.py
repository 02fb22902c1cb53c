"""Prefixes are found by digest, believed by tokens, and forgotten from their ends."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.cache.chain import Chain, seed_of
from mnemosyne.cache.prefix import PrefixIndex

PAGE_SIZE = 4
SEED = seed_of(b"model", None)


def chain_of(ids: list[int] | np.ndarray, seed: bytes = SEED) -> Chain:
    return Chain(seed, np.asarray(ids, dtype=np.int64), PAGE_SIZE)


def known_index(chain: Chain, pages: list[int], num_pages: int = 20) -> PrefixIndex:
    """An index that knows a chain on some pages, which nobody holds any more."""
    index = PrefixIndex(num_pages, PAGE_SIZE)
    add(index, chain, pages)
    return index


def add(index: PrefixIndex, chain: Chain, pages: list[int], shared: int = 0) -> None:
    """A request computes the pages of a chain but the first, which it shares, and ends."""
    held = np.array(pages, dtype=np.int64)
    index.hold(held[:shared])
    index.add(chain, shared, held[shared:], int(held[shared - 1]) if shared else None)
    index.let_go(held)


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_a_chain_grows_to_what_it_would_have_been_from_the_start(ids, cut):
    grown = chain_of(ids[:cut])
    for token in ids[cut:]:
        grown.append(token)

    whole = chain_of(ids)

    assert grown.digests == whole.digests
    num_full = len(whole.digests)
    np.testing.assert_array_equal(grown.tokens(0, num_full), whole.tokens(0, num_full))
    assert grown.beginning(num_full).tolist() == ids[num_full * PAGE_SIZE :]


def test_models_and_salts_share_no_digest():
    ids = np.arange(8)
    seeds = [seed_of(b"model", None), seed_of(b"other", None)]
    seeds += [seed_of(b"model", salt) for salt in ("", "a", "b")]

    digests = [chain_of(ids, seed).digests[0] for seed in seeds]

    assert len(set(digests)) == len(seeds)


def test_the_longest_known_run_is_found():
    chain = chain_of(range(16))
    index = known_index(chain, [7, 3, 9, 5])

    assert index.match(chain_of([*range(10), 77, 77, 77]), 0, 3).tolist() == [7, 3]
    assert index.match(chain, 0, 3).tolist() == [7, 3, 9]
    assert index.match(chain_of([1, *range(16)]), 0, 4).tolist() == []


def test_equal_digests_of_other_tokens_are_not_believed():
    index = known_index(chain_of(range(12)), [0, 1, 2])
    forged = chain_of([0, 1, 2, 3, 4, 5, 6, 99, 8, 9, 10, 11])
    forged.digests[:] = chain_of(range(12)).digests

    assert index.match(forged, 0, 3).tolist() == [0]


def test_chains_go_from_their_ends_the_one_used_longest_ago_first():
    first, second = chain_of(range(12)), chain_of(range(50, 58))
    index = known_index(first, [0, 1, 2])
    add(index, second, [4, 5])
    add(index, chain_of([*range(8), 7, 7, 7, 7]), [0, 1, 6], shared=2)  # used again, branched

    assert index.num_idle == 6
    assert index.evict(6).tolist() == [2, 5, 4, 6, 1, 0]
    assert index.num_idle == 0


def test_pages_that_somebody_holds_stay():
    chain = chain_of(range(12))
    index = known_index(chain, [0, 1, 2])
    index.hold(index.match(chain, 0, 2))

    assert index.num_idle == 1
    assert index.evict(1).tolist() == [2]
    assert index.match(chain, 0, 3).tolist() == [0, 1]


def test_what_is_forgotten_while_it_is_held_is_free_once_it_is_let_go():
    chain = chain_of(range(8))
    index = known_index(chain, [0, 1])
    held = index.match(chain, 0, 1)
    index.hold(held)
    index.hold(held)

    assert index.clear().tolist() == [1]
    assert index.match(chain, 0, 2).tolist() == []
    assert index.let_go(held).tolist() == []
    assert index.let_go(held).tolist() == [0]


def test_the_nearest_cached_page_says_where_a_prompt_differs():
    index = known_index(chain_of([1, 2, 3, 4, 5, 6, 7, 8]), [0, 1])
    add(index, chain_of([1, 2, 3, 4, 5, 9, 9, 9]), [0, 2], shared=1)
    wanted = chain_of([1, 2, 3, 4, 5, 6, 0, 8])

    nearest = index.nearest(wanted, 1)

    assert nearest is not None
    assert nearest.num_equal == 2
    assert nearest.tokens.tolist() == [5, 6, 7, 8]
    assert index.nearest(chain_of([1, 2, 3, 4]), 1) is None


def test_no_page_of_another_model_or_salt_is_near():
    ids, seed = [1, 2, 3, 9, 5], seed_of(b"model", "a")
    index = known_index(chain_of([1, 2, 3, 4], seed), [0])
    others = [SEED, seed_of(b"model", "b"), seed_of(b"other", "a")]

    own, *foreign = (index.nearest(chain_of(ids, seed), 0) for seed in [seed, *others])

    assert own is not None
    assert own.num_equal == 3
    assert foreign == [None, None, None]


def test_many_uses_do_not_pile_up():
    chain = chain_of(range(8))
    index = known_index(chain, [0, 1])
    pages = index.match(chain, 0, 2)

    for _ in range(2000):
        index.hold(pages)
        index.let_go(pages)

    assert len(index._ends) < 500
    assert index.evict(2).tolist() == [1, 0]
