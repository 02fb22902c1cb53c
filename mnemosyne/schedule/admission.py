"""The admission queue: requests that wait for pages or a place, and a guard against starvation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.table import PageTable
from mnemosyne.config import SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.policy import Policy
from mnemosyne.schedule.prefill_queue import PrefillQueue
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.request_state import UNPLACED, RequestState
from mnemosyne.schedule.routing import NOTHING, Router

FOREVER_S = 1e9  # three decades: later deadlines are no less urgent, and slack stays finite


@dataclass(slots=True)
class Reservation:
    """Pages that one overdue request will get, whoever comes before it until then.

    Others may take pages of its groups only as long as it would fit beside them. Those that were
    there before end, so it fits in the end.
    """

    prompt: RequestState
    pages: dict[int, int]  # by group
    holders: dict[int, PageTable] = field(default_factory=dict)  # let in since, by request

    def held(self, group: int) -> int:
        """Pages of a group that went to others since the reservation was made."""
        return sum(len(table.pages_on(group)) for table in self.holders.values())


class AdmissionQueue:
    """Lets requests in by priority and policy, as far as their pages are free.

    One that does not fit now is passed by others that do, until it can no longer meet its
    deadline: then it reserves pages. One reservation stands at a time, and the oldest request of
    the first class makes it. Under a policy such as ``fcfs`` nobody passes anybody.

    Args:
        policy: who goes first.
        slo: when a first token is due.
        ledger: the pages of the cache.
        router: chooses groups.
        table: predicted time of a prefill.
    """

    def __init__(
        self, policy: Policy, slo: SloConfig, ledger: Ledger, router: Router, table: PrefillTable
    ) -> None:
        self._may_pass = policy.lets_pass
        self._slo = slo
        self._ledger = ledger
        self._router = router
        self._table = table
        self._queue = PrefillQueue(policy, table)
        self._largest_tokens: float = 0  # tokens of the largest request
        self._reservation: Reservation | None = None
        self._is_settled = True  # nothing changed since everyone was tried

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: Request, *, num_planned: int = 0) -> RequestState:
        """Queue a request, of whose prompt so many tokens need no planning any more."""
        self._table.extend(request.num_prompt_tokens)
        deadline_s, arrival_s = request.deadline_s, request.arrival_s
        if deadline_s is None:
            alone_s = self._table.seconds(num_planned, request.num_prompt_tokens)
            deadline_s = max(self._slo.ttft_min_s, self._slo.ttft_scale * alone_s)
        total_s = self._table.at(request.num_prompt_tokens)
        due_s = arrival_s + min(deadline_s, FOREVER_S)
        prompt = RequestState(
            *(arrival_s, due_s, total_s, self._table.at(num_planned), request, deadline_s),
            num_planned=num_planned,
        )
        self._queue.add(prompt)
        self._largest_tokens = max(self._largest_tokens, request.max_tokens)
        self._is_settled = False
        return prompt

    def discard(self, prompt: RequestState) -> None:
        """Forget a request that waits here."""
        self._remove([prompt])
        if self._reservation is not None and self._reservation.prompt is prompt:
            self._reservation = None
        self._is_settled = False

    def note_release(self, request_id: int) -> None:
        """Take note that an admitted request gave its pages and its place back."""
        if self._reservation is not None:
            self._reservation.holders.pop(request_id, None)
        self._is_settled = False

    def clear(self) -> None:
        """Forget all."""
        self._queue.clear()
        self._largest_tokens = 0
        self._reservation = None

    def admit(self, num_places: int, now_s: float) -> list[RequestState]:
        """Let requests in, at most ``num_places``; their pages are reserved."""
        if self._is_settled or num_places <= 0 or not self._queue:
            return []
        self._is_settled = True
        admitted: list[RequestState] = []
        for prompt in self._order(now_s):
            if prompt.table is not UNPLACED:
                continue
            table = self._place(prompt.request)
            if table is not None:
                prompt.table = table
                if prompt.num_planned:
                    self._router.advance(table, 0, prompt.num_planned)
                admitted.append(prompt)
                if len(admitted) == num_places:
                    break
            elif not self._may_pass:
                break
        self._remove(admitted)
        return admitted

    def _remove(self, prompts: list[RequestState]) -> None:
        self._queue.remove(prompts)
        if any(prompt.request.max_tokens == self._largest_tokens for prompt in prompts):
            self._largest_tokens = self._queue.largest_tokens()

    def _order(self, now_s: float) -> Iterator[RequestState]:
        """Those that may fit, the first to be let in first; its holder may come twice."""
        factor = self._queue.follow_table()
        max_free, max_per_group = self._ledger.max_free_tokens(), self._ledger.max_tokens_per_group
        at_once = min(max_free, max_per_group)  # tokens of the largest shard that is sure to fit
        if not self._may_pass or self._largest_tokens <= at_once:
            order = self._queue.in_order(now_s, factor)
        else:
            if self._reservation is None:
                overdue = self._queue.overdue(now_s, factor, at_once)
                self._reservation = self._new_reservation(overdue)
            # what needs several shards may fit where one fits
            fits = inf if max_free >= max_per_group else max_free
            order = self._queue.in_order(now_s, factor, fits)
        if self._reservation is None:
            return order
        return chain([self._reservation.prompt], order)

    def _place(self, request: Request) -> PageTable | None:
        reservation, kept = self._reservation, NOTHING
        is_holder = reservation is not None and reservation.prompt.request is request
        if (
            reservation is not None
            and not is_holder
            and reservation.prompt.request.priority <= request.priority
        ):
            kept = {group: self._kept(reservation, group) for group in reservation.pages}
        groups = self._router.choose(request.max_tokens, kept=kept)
        if groups is None:
            return None
        table = self._ledger.reserve(request.request_id, groups, request.max_tokens)
        self._router.start(table, request.num_prompt_tokens)
        if is_holder:
            self._reservation = None
        elif reservation is not None:
            reservation.holders[request.request_id] = table
        return table

    def _kept(self, reservation: Reservation, group: int) -> int:
        """Free pages of a group that others must leave."""
        num_pages = self._ledger.group_pages[group]
        for_others = num_pages - reservation.pages[group] - reservation.held(group)
        return max(0, self._ledger.num_free(group) - for_others)

    def _new_reservation(self, overdue: list[RequestState]) -> Reservation | None:
        """That of the first request for which there is no room, if there is one."""
        for prompt in overdue:
            num_tokens = prompt.request.max_tokens
            if not self._router.has_room(num_tokens):
                return Reservation(prompt, self._router.best_groups(num_tokens))
        return None
