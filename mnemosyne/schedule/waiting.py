"""Requests that wait for pages or a place: who is let in next, and that everyone is in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from mnemosyne.cache.layout import Placement
from mnemosyne.config import SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.draft import Running
from mnemosyne.schedule.policy import POLICIES, Urgency
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.prompts import ARRIVAL, DUE, PRIORITY, ROOM, TURN, Prompts
from mnemosyne.schedule.routing import Router


@dataclass(slots=True)
class Claim:
    """Pages that one overdue request will get, whoever comes before it until then.

    Others may take pages of its groups only as long as it would fit beside them. Those that were
    there before end, so it fits in the end.
    """

    request: Request
    pages: dict[int, int]  # by group
    holders: dict[int, Placement] = field(default_factory=dict)  # let in since, by request

    def held(self, group: int) -> int:
        """Pages of a group that went to others since the claim was made."""
        shards = (shard for placement in self.holders.values() for shard in placement.shards)
        return sum(len(shard.pages) for shard in shards if shard.group == group)


class Waiting:
    """Lets requests in by priority and policy, as far as their pages are free.

    One that does not fit now is passed by others that do, until it can no longer meet its
    deadline: then it claims pages. One claim stands at a time, and the oldest request of the
    first class makes it. Under ``fcfs`` nobody passes anybody.

    Args:
        policy: by name.
        slo: when a first token is due.
        router: places requests on the pages of the cache.
        table: predicted time of a prefill.
    """

    def __init__(self, policy: str, slo: SloConfig, router: Router, table: PrefillTable) -> None:
        self._may_pass = policy != "fcfs"
        self._slo = slo
        self._router = router
        self._table = table
        self._prompts: Prompts[Request] = Prompts(POLICIES[policy], table)
        self._claim: Claim | None = None
        self._is_settled = True  # nothing changed since everyone was tried

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, request: Request) -> float:
        """Queue a request.

        Returns:
            Its deadline for the first token, seconds after its arrival.
        """
        self._table.extend(request.num_prompt_tokens)
        deadline_s = request.deadline_s
        if deadline_s is None:
            alone_s = self._table.seconds(0, request.num_prompt_tokens)
            deadline_s = max(float(self._slo.ttft_min), self._slo.ttft_scale * alone_s)
        self._prompts.add(request, request, due_s=request.arrival_s + deadline_s)
        self._is_settled = False
        return deadline_s

    def discard(self, request_id: int) -> bool:
        """Forget a request, if it waits here."""
        if self._prompts.discard(request_id) is None:
            return False
        if self._claim is not None and self._claim.request.request_id == request_id:
            self._claim = None
        self._is_settled = False
        return True

    def note_release(self, request_id: int) -> None:
        """Take note that an admitted request gave its pages and its place back."""
        if self._claim is not None:
            self._claim.holders.pop(request_id, None)
        self._is_settled = False

    def clear(self) -> None:
        """Forget all."""
        self._prompts.clear()
        self._claim = None

    def admit(self, num_places: int, now_s: float) -> list[Running]:
        """Let requests in, at most ``num_places``; their pages are reserved."""
        if self._is_settled or num_places <= 0 or not self._prompts:
            return []
        self._is_settled = True
        admitted: dict[int, Running] = {}  # by row
        dues_s = self._prompts.column(DUE)
        for row in self._order(now_s):
            if row in admitted:
                continue
            request = self._prompts.items[row]
            placement = self._place(request)
            if placement is not None:
                admitted[row] = Running(request, placement, float(dues_s[row]))
                if len(admitted) == num_places:
                    break
            elif not self._may_pass:
                break
        self._prompts.drop(list(admitted))
        return list(admitted.values())

    def _order(self, now_s: float) -> Iterator[int]:
        """Rows of those that may fit, the first to be let in first; the claimant may come twice."""
        urgency = self._prompts.urgency(now_s)
        if not self._may_pass:
            return self._prompts.in_order(urgency)
        most_free = self._router.most_free_tokens()
        may_fit = None  # all of them
        if self._prompts.column(ROOM).max() > min(most_free, self._router.max_tokens_per_group):
            may_fit = self._may_fit(most_free)
            if self._claim is None:
                self._claim = self._new_claim(urgency, may_fit)
        order = self._prompts.in_order(urgency, may_fit)
        if self._claim is None:
            return order
        claimant = self._prompts.row(self._claim.request.request_id)
        assert claimant is not None, "who is let in or gone claims nothing"
        return chain([claimant], order)

    def _place(self, request: Request) -> Placement | None:
        claim, kept = self._claim, {}
        is_claimant = claim is not None and claim.request is request
        if claim is not None and not is_claimant and claim.request.priority <= request.priority:
            kept = {group: self._kept(claim, group) for group in claim.pages}
        placement = self._router.place(request.max_tokens, request.num_prompt_tokens, kept=kept)
        if is_claimant and placement is not None:
            self._claim = None
        elif claim is not None and placement is not None:
            claim.holders[request.request_id] = placement
        return placement

    def _kept(self, claim: Claim, group: int) -> int:
        """Free pages of a group that others must leave."""
        allocator = self._router.allocators[group]
        for_others = allocator.num_pages - claim.pages[group] - claim.held(group)
        return max(0, allocator.num_free - for_others)

    def _may_fit(self, most_free: int) -> np.ndarray:
        """Of each row, whether the pages of its largest shard are free somewhere: bool ``[B]``."""
        tokens = np.minimum(self._prompts.column(ROOM), self._router.max_tokens_per_group)
        fits: np.ndarray = tokens <= most_free
        return fits

    def _new_claim(self, urgency: Urgency, may_fit: np.ndarray) -> Claim | None:
        """That of the oldest request that has no time to spare and no room, if there is one."""
        is_several = self._prompts.column(ROOM) > self._router.max_tokens_per_group
        rows = np.flatnonzero((is_several | ~may_fit) & (urgency.slack_s <= 0))
        columns = [self._prompts.column(index)[rows] for index in (TURN, ARRIVAL, PRIORITY)]
        for row in rows[np.lexsort(columns)].tolist():
            request = self._prompts.items[row]
            if not self._router.has_room(request.max_tokens):
                return Claim(request, self._router.best_groups(request.max_tokens))
        return None
