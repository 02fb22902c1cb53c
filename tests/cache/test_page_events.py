"""References stay exact and nothing is used once it is free, whatever requests do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tools.page_events import PageEvents, RandomEvents

tokens = st.lists(st.integers(0, 1), min_size=1, max_size=40)


class PageMachine(RuleBasedStateMachine):
    """Requests over tokens of two values, so that many begin alike."""

    running = Bundle("running")

    def __init__(self) -> None:
        super().__init__()
        self.events = PageEvents(num_pages=(9, 7), max_tokens_per_group=20)
        self._next = 0

    @rule(
        target=running,
        prompt=tokens,
        num_output=st.integers(1, 8),
        salt=st.sampled_from([None, "", "a"]),
    )
    def start(self, prompt: list[int], num_output: int, salt: str | None) -> int:
        ids = np.array([*prompt, *[1] * num_output], dtype=np.int64)[:40]
        self._next += 1
        self.events.start(self._next, ids, min(len(prompt), len(ids) - 1) or 1, salt)
        return self._next

    @rule(holder=running, num_tokens=st.integers(1, 24), is_broken=st.booleans())
    def compute(self, holder: int, num_tokens: int, is_broken: bool) -> None:
        if holder in self.events.holders:
            self.events.compute(holder, num_tokens, is_broken=is_broken and num_tokens > 20)

    @rule(holder=consumes(running))
    def end(self, holder: int) -> None:
        if holder in self.events.holders:
            self.events.end(holder)

    @rule()
    def clear(self) -> None:
        self.events.clear()

    @invariant()
    def counts_are_exact(self) -> None:
        self.events.check_counts()


TestPageMachine = PageMachine.TestCase
TestPageMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(3))
def test_random_conversations_leave_no_page_behind(seed: int) -> None:
    workload = RandomEvents(seed)

    for _ in range(3000):
        workload.step()
    workload.events.check_counts()
    for holder in list(workload.events.holders):
        workload.events.end(holder)
    workload.events.clear()

    counts, ledger = workload.events.counts, workload.events.ledger
    assert ledger.num_used == ledger.num_idle == 0
    assert min(counts[kind] for kind in ("shared", "started", "ended", "refused")) > 50
