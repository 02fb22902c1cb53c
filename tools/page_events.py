"""Requests that share, branch, break, end and evict each other, over a cache that is checked.

Every position has a value that follows from all tokens up to it, as keys and values do. A page
that nobody holds and no prefix needs is poisoned at once; whoever reads a page looks at every
value in it. So a page that is freed too early, given twice or shared wrongly is seen. No model
and no rank runs. All follows from the seed.

Usage: python tools/page_events.py [--events 1M] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mnemosyne.cache.chain import Chain, seed_of
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place
from mnemosyne.config import parse_size

PAGE_SIZE = 4
POISON = -1
FACTOR, MODULUS = 1_000_003, 2**61 - 1


def values_of(salt: str | None, ids: np.ndarray) -> np.ndarray:
    """The value of each position, int64."""
    value, values = sum((salt or "").encode()), []
    for token in ids.tolist():
        value = (value * FACTOR + token + 7) % MODULUS
        values.append(value)
    return np.array(values, dtype=np.int64)


@dataclass(slots=True)
class Holder:
    """A request that runs."""

    ids: np.ndarray  # prompt and output
    values: np.ndarray
    chain: Chain  # of the tokens so far
    num_prompt_tokens: int
    num_computed: int
    num_whole: int  # positions before the first that is not finite
    is_broken: bool = False


@dataclass(slots=True)
class PageEvents:
    """A cache, what lies in its pages, and who runs.

    Args:
        num_pages: of each group.
        max_tokens_per_group: of one request.
    """

    num_pages: tuple[int, ...] = (24, 24)
    max_tokens_per_group: int = 32
    ledger: Ledger = field(init=False)
    memory: list[np.ndarray] = field(init=False)
    holders: dict[int, Holder] = field(init=False, default_factory=dict)
    counts: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.ledger = Ledger(
            self.num_pages,
            page_size=PAGE_SIZE,
            max_tokens_per_group=self.max_tokens_per_group,
            shares=True,
        )
        self.memory = [np.full((n, PAGE_SIZE), POISON, dtype=np.int64) for n in self.num_pages]

    def start(self, holder: int, ids: np.ndarray, num_prompt_tokens: int, salt: str | None) -> bool:
        """A request arrives; whether it found its pages."""
        chain = Chain(seed_of(b"model", salt), ids[:num_prompt_tokens], PAGE_SIZE)
        places = self._choose(chain, len(ids), (num_prompt_tokens - 1) // PAGE_SIZE)
        if places is None:
            self.counts["refused"] += 1
            return False
        self.ledger.reserve(holder, places, len(ids))
        num_cached = sum(len(place.shared) for place in places) * PAGE_SIZE
        self.counts["shared" if num_cached else "started"] += 1
        values = values_of(salt, ids)
        whole = num_cached, num_cached
        self.holders[holder] = Holder(ids, values, chain, num_prompt_tokens, *whole)
        self._poison()
        self._check(holder)
        return True

    def compute(self, holder: int, num_tokens: int, *, is_broken: bool = False) -> None:
        """A step computes more of a request; from a broken one on nothing of it is whole."""
        state = self.holders[holder]
        start = state.num_computed
        stop = min(start + num_tokens, len(state.ids))
        state.is_broken |= is_broken
        for position in range(start, stop):
            if position >= state.num_prompt_tokens:
                state.chain.append(int(state.ids[position]))
            group, page, slot = self._at(holder, position)
            self.memory[group][page, slot] = POISON if state.is_broken else state.values[position]
        state.num_computed = stop
        self.counts["computed"] += 1
        if not state.is_broken:
            state.num_whole = stop
            self.ledger.publish(holder, state.chain, stop)

    def end(self, holder: int) -> None:
        """A request ends, is cancelled or set back."""
        self._check(holder)
        state = self.holders.pop(holder)
        self.ledger.release(holder, state.chain, state.num_whole)
        self.counts["ended"] += 1
        self._poison()

    def clear(self) -> None:
        """All prefixes are forgotten."""
        self.ledger.clear()
        self.counts["cleared"] += 1
        self._poison()

    def check_counts(self) -> None:
        """Free, idle and held pages are all pages, and each is one of the three."""
        ledger = self.ledger
        for group in ledger.groups:
            tables = [ledger.table_of(holder).pages_on(group) for holder in self.holders]
            listed = Counter(int(page) for pages in tables for page in pages)
            assert len(listed) == self.num_pages[group] - ledger.num_free(group)
            for page, number in listed.items():
                assert ledger.num_holders(group, page) in (number, None)

    def _check(self, holder: int) -> None:
        """All that was computed of a request is what it should be."""
        state = self.holders[holder]
        for position in range(state.num_whole):
            group, page, slot = self._at(holder, position)
            assert self.memory[group][page, slot] == state.values[position]

    def _at(self, holder: int, position: int) -> tuple[int, int, int]:
        extent = self.ledger.table_of(holder).storing(position)
        page, slot = divmod(position - extent.start, PAGE_SIZE)
        return extent.group, int(extent.pages[page]), slot

    def _choose(self, chain: Chain, num_tokens: int, num_cacheable: int) -> list[Place] | None:
        """Places in the order of groups, the first one by where most is known."""
        ledger, places, first, is_whole = self.ledger, list[Place](), 0, True
        groups = list(ledger.groups)
        for size in ledger.shard_pages(num_tokens):
            stop = min(first + size, num_cacheable) if is_whole else first
            shards = [Place(group, ledger.match(group, chain, first, stop)) for group in groups]
            shards = [p for p in shards if ledger.num_free(p.group) >= size - ledger.num_held(p)]
            if not shards:
                return None
            best = max(shards, key=lambda place: len(place.shared))
            places.append(best)
            groups.remove(best.group)
            is_whole, first = len(best.shared) == size, first + size
        return places

    def _poison(self) -> None:
        for group in self.ledger.groups:
            self.memory[group][self.ledger.unused(group)] = POISON


class RandomEvents:
    """A workload of branching conversations, from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.events = PageEvents()
        self._texts: list[np.ndarray] = [np.zeros(0, dtype=np.int64)]
        self._next = 0

    def step(self) -> None:
        """One event."""
        rng, holders = self.rng, self.events.holders
        kind = rng.random()
        if kind < 0.2 or not holders:
            self._start()
            return
        holder = list(holders)[int(rng.integers(len(holders)))]
        state = holders[holder]
        if kind < 0.85 and state.num_computed < len(state.ids):
            is_broken = bool(rng.random() < 0.02)
            self.events.compute(holder, int(rng.integers(1, 12)), is_broken=is_broken)
        elif kind < 0.999:
            self._texts.append(state.ids[: state.num_computed])
            del self._texts[1:-20]
            self.events.end(holder)
        else:
            self.events.clear()

    def _start(self) -> None:
        rng = self.rng
        text = self._texts[int(rng.integers(len(self._texts)))]
        kept = text[: int(rng.integers(len(text) + 1))] if rng.random() < 0.5 else text
        fresh = rng.integers(0, 3, int(rng.integers(1, 30)))
        prompt = np.concatenate([kept, fresh])[:50]
        ids = np.concatenate([prompt, rng.integers(0, 3, int(rng.integers(1, 14)))])
        salt = [None, "a"][int(rng.random() < 0.2)]
        self.events.start(self._next, ids, len(prompt), salt)
        self._next += 1


WORKLOAD_EVENTS = 20_000  # of one seed; the next ones follow


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", default="1M", help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first workload")
    arguments = parser.parse_args()
    num_left, seed = parse_size(arguments.events, "--events"), arguments.seed
    counts, started_s = Counter[str](), time.perf_counter()
    while num_left > 0:
        workload = RandomEvents(seed)
        for index in range(min(num_left, WORKLOAD_EVENTS)):
            workload.step()
            if index % 100 == 0:
                workload.events.check_counts()
        counts += workload.events.counts
        num_left -= WORKLOAD_EVENTS
        seed += 1
    parts = ", ".join(f"{number:,} {kind}" for kind, number in counts.most_common())
    print(f"{sum(counts.values()):,} events in {time.perf_counter() - started_s:.0f} s: {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
