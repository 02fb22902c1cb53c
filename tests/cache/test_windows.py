"""Rings and kept windows hold what the next token sees, whoever came, shared, broke and went."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

from mnemosyne.cache.chain import Chain, seed_of
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.windows import seen_after
from mnemosyne.schedule.routing import Router

PAGE_SIZE, POISON = 4, -1


def values_of(ids: np.ndarray) -> np.ndarray:
    """A value of each position that follows from all tokens up to it."""
    value, values = 0, []
    for token in ids.tolist():
        value = (value * 1_000_003 + token + 7) % (2**61 - 1)
        values.append(value)
    return np.array(values, dtype=np.int64)


@dataclass(slots=True)
class Running:
    """A request that runs."""

    ids: np.ndarray  # prompt and output
    num_prompt_tokens: int
    chain: Chain
    num_computed: int


@dataclass(slots=True)
class Events:
    """A cache of layers that forget, and what lies in its pages.

    Args:
        windows: of the layers.
        num_pages: of each of two groups.
    """

    windows: list[int | None]
    num_pages: int = 70
    ledger: Ledger = field(init=False)
    memory: np.ndarray = field(init=False)
    running: dict[int, Running] = field(default_factory=dict)
    num_hits: int = 0

    def __post_init__(self) -> None:
        kinds = PageKinds.of(self.windows, PAGE_SIZE)
        room = {"page_size": PAGE_SIZE, "max_tokens_per_group": 40 if kinds.keeps else 2**20}
        self.ledger = Ledger([self.num_pages] * 2, shares=True, kinds=kinds, **room)
        self.memory = np.full((2, self.num_pages, PAGE_SIZE), POISON, dtype=np.int64)

    def start(self, holder: int, ids: np.ndarray, num_prompt_tokens: int) -> None:
        chain = Chain(seed_of(b"model", None), ids[:num_prompt_tokens], PAGE_SIZE)
        num_cacheable = (num_prompt_tokens - 1) // PAGE_SIZE
        router = Router(self.ledger)
        places = router.choose(len(ids), chain=chain, num_cacheable=num_cacheable)
        if places is None:
            return
        num_shared = self.ledger.num_shared(places)
        self.num_hits += num_shared > 0
        self.ledger.reserve(holder, places, len(ids), chain)
        self.running[holder] = Running(ids, num_prompt_tokens, chain, num_shared * PAGE_SIZE)
        self._copy()
        self._look(holder)

    def compute(self, holder: int, num_tokens: int) -> None:
        """A chunk of the prompt, or a token of the output."""
        state = self.running[holder]
        start, is_prompt = state.num_computed, state.num_computed < state.num_prompt_tokens
        stop = min(start + num_tokens, state.num_prompt_tokens) if is_prompt else start + 1
        if stop > len(state.ids):
            return
        self._look(holder)
        table, values = self.ledger.table_of(holder), values_of(state.ids[:stop])
        for ring in table.rings:
            first_kept = ((stop - 1) // PAGE_SIZE + 1 - ring.shape[1]) * PAGE_SIZE
            for position in range(max(start, first_kept), stop):
                page = ring[:, position // PAGE_SIZE % ring.shape[1]]
                self.memory[table.reporter, page, position % PAGE_SIZE] = values[position]
        for position in range(start, stop) if self.ledger.kinds.keeps else ():
            extent = table.storing(position)
            page = extent.pages[(position - extent.start) // PAGE_SIZE]
            self.memory[extent.group, page, position % PAGE_SIZE] = values[position]
        if not is_prompt:
            state.chain.append(int(state.ids[start]))
        state.num_computed = stop
        self.ledger.publish(holder, state.chain, stop)
        if is_prompt and stop == state.num_prompt_tokens:
            self.ledger.keep_end(holder, state.chain, (stop - 1) // PAGE_SIZE)
            self._copy()

    def end(self, holder: int, *, is_whole: bool) -> None:
        state = self.running.pop(holder)
        what = holder, state.chain, state.num_computed
        self.ledger.release(*what, is_whole=is_whole)
        for group in self.ledger.groups:
            self.memory[group, self.ledger.unused(group)] = POISON

    def _copy(self) -> None:
        for group, sources, targets in self.ledger.take_moved():
            self.memory[group, targets] = self.memory[group, sources]

    def _look(self, holder: int) -> None:
        """The next token sees its window in every ring, and all keys where they are kept."""
        state, table = self.running[holder], self.ledger.table_of(holder)
        values = values_of(state.ids[: state.num_computed])
        for window, ring in zip(self.ledger.kinds.windows, table.rings, strict=True):
            for position in range(max(0, state.num_computed - window.size + 1), state.num_computed):
                pages = ring[:, position // PAGE_SIZE % ring.shape[1]]
                found = self.memory[table.reporter, pages, position % PAGE_SIZE]
                assert (found == values[position]).all()
        for position in range(state.num_computed if self.ledger.kinds.keeps else 0):
            extent = table.storing(position)
            page = extent.pages[(position - extent.start) // PAGE_SIZE]
            assert self.memory[extent.group, page, position % PAGE_SIZE] == values[position]


@pytest.mark.parametrize("windows", [[8, 8, None], [6, None, 11], [9, 9]], ids=str)
def test_every_token_finds_its_window_whatever_happened_before(windows: list[int | None]) -> None:
    rng, events = np.random.default_rng(0), Events(windows)
    texts = [rng.integers(0, 9, 60)]
    for holder in range(1500):
        what, chosen = rng.integers(0, 10), list(events.running)
        if what < 3 and len(chosen) < 6:
            text = texts[rng.integers(0, len(texts))][: rng.integers(0, 60)]
            ids = np.concatenate([text, rng.integers(0, 9, rng.integers(2, 15))])
            events.start(holder, ids, int(rng.integers(1, len(ids))))
            texts = [*texts[-20:], ids]
        elif what < 9 and chosen:
            events.compute(chosen[rng.integers(0, len(chosen))], int(rng.integers(1, 40)))
        elif chosen:
            events.end(chosen[rng.integers(0, len(chosen))], is_whole=bool(rng.integers(0, 4)))
    for holder in list(events.running):
        events.end(holder, is_whole=True)

    assert events.num_hits > 50
    assert events.ledger.num_used == 0
    events.ledger.clear()
    assert events.ledger.num_idle == 0


def test_the_pages_after_which_a_token_comes_are_those_of_its_window() -> None:
    kinds = PageKinds.of([8, None], 4)

    assert [list(seen_after(kinds, kinds.windows[0], n)) for n in (1, 2, 3, 7)] == [
        [0],
        [0, 1],
        [1, 2],
        [5, 6],
    ]
