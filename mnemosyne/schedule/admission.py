"""The admission queue: requests that wait for pages or a place, and a guard against starvation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place
from mnemosyne.cache.table import PageTable
from mnemosyne.config import SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.policy import Policy
from mnemosyne.schedule.prefill_queue import PrefillQueue
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.prefixes import Prefixes
from mnemosyne.schedule.request_state import UNPLACED, RequestState
from mnemosyne.schedule.routing import NOTHING, Router

PATIENCE, PATIENCE_S = 2.0, 0.25  # times, and seconds, that a chunk of another may be late
FOREVER_S = 1e9  # three decades: later deadlines are no less urgent, and slack stays finite


@dataclass(slots=True)
class Reservation:
    """Pages that one overdue request will get, whoever comes before it until then.

    Others may take pages of its groups only as long as it would fit beside them. Those that were
    there before end, so it fits in the end.
    """

    prompt: RequestState
    pages: dict[int, int]  # by group
    # free pages by group that went to those let in since, by request
    holders: dict[int, dict[int, int]] = field(default_factory=dict)

    def held(self, group: int) -> int:
        """Pages of a group that went to others since the reservation was made."""
        return sum(taken.get(group, 0) for taken in self.holders.values())


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
        prefixes: what requests share; None: nothing.
    """

    def __init__(
        self,
        policy: Policy,
        slo: SloConfig,
        ledger: Ledger,
        router: Router,
        table: PrefillTable,
        prefixes: Prefixes | None = None,
    ) -> None:
        self._may_pass = policy.lets_pass
        self._slo = slo
        self._ledger = ledger
        self._router = router
        self._table = table
        self._prefixes = prefixes
        self._queue = PrefillQueue(policy, table)
        self._largest_tokens: float = 0  # tokens of the largest request
        self._reservation: Reservation | None = None
        self._is_settled = True  # nothing changed since everyone was tried
        self.lacks_pages = False  # whether any request waits for pages, as of the last try

    def __len__(self) -> int:
        return len(self._queue)

    def add(
        self,
        request: Request,
        *,
        num_planned: int = 0,
        num_reserved: int | None = None,
        is_shared: bool = False,
        due_s: float | None = None,
    ) -> RequestState:
        """Queue a request, of whose prompt so many tokens need no planning any more.

        Args:
            request: of any kind.
            num_planned: tokens that are said to be cached.
            num_reserved: tokens that it needs pages for; unset: all that it may have.
            due_s: when its first token is due or was, if it has waited before.
            is_shared: whether its pages may be those of others, and others may have its own.
        """
        self._table.extend(request.num_prompt_tokens)
        prompt = RequestState(request.arrival_s, 0.0, 0.0, 0.0, request, 0.0)
        prompt.num_planned, prompt.num_reserved = num_planned, num_reserved or request.max_tokens
        prompt.num_needed = prompt.num_reserved
        prompt.outputs = [] if request.is_open else None
        if is_shared and self._prefixes is not None:
            prompt.outputs = []
            prompt.chain = self._prefixes.chain_of(request)
            self._note_cached(prompt, self._prefixes.count(prompt) * self._ledger.page_size)
            prompt.num_needed -= prompt.num_cached
        else:
            self.look_up(prompt)
        if due_s is not None:
            prompt.deadline_s = due_s - request.arrival_s
        elif request.deadline_s is not None:
            prompt.deadline_s = request.deadline_s
        else:
            alone_s = self._table.seconds(prompt.num_planned, request.num_prompt_tokens)
            prompt.deadline_s = max(self._slo.ttft_min_s, self._slo.ttft_scale * alone_s)
        prompt.due_s = prompt.arrival_s + min(prompt.deadline_s, FOREVER_S)
        self._queue.add(prompt)
        self._largest_tokens = max(self._largest_tokens, prompt.num_needed)
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

    def note_room(self) -> None:
        """Take note that pages are free which were not."""
        self._is_settled = False

    def clear(self) -> None:
        """Forget all."""
        self._queue.clear()
        self._largest_tokens = 0
        self._reservation = None
        self.lacks_pages = False

    def admit(self, num_places: int, now_s: float) -> list[RequestState]:
        """Let requests in, at most ``num_places``; their pages are reserved."""
        if not self._queue:
            self.lacks_pages = False
        if self._is_settled or num_places <= 0 or not self._queue:
            return []
        self._is_settled = True
        self.lacks_pages = False
        admitted: list[RequestState] = []
        for prompt in self._order(now_s):
            if prompt.table is not UNPLACED:
                continue
            if self._waits_for_pages(prompt, now_s):
                self._is_settled = False
                if self._may_pass:
                    continue
                break
            table = self._place(prompt)
            if table is not None:
                prompt.table, prompt.leader = table, None
                if prompt.num_planned:
                    self._router.advance(table, 0, prompt.num_planned)
                if prompt.chain is not None and self._prefixes is not None:
                    self._prefixes.start(prompt)
                admitted.append(prompt)
                if len(admitted) == num_places:
                    break
            else:
                self.lacks_pages = True
                if not self._may_pass:
                    break
        self._remove(admitted)
        return admitted

    def _remove(self, prompts: list[RequestState]) -> None:
        self._queue.remove(prompts)
        if self._largest_tokens in [prompt.num_needed for prompt in prompts]:
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
            self.lacks_pages = fits < self._largest_tokens
            order = self._queue.in_order(now_s, factor, fits)
        if self._reservation is None:
            return order
        return chain([self._reservation.prompt], order)

    def _place(self, prompt: RequestState) -> PageTable | None:
        request, reservation, kept = prompt.request, self._reservation, NOTHING
        is_holder = reservation is not None and reservation.prompt is prompt
        if (
            reservation is not None
            and not is_holder
            and reservation.prompt.request.priority <= request.priority
        ):
            kept = {group: self._kept(reservation, group) for group in reservation.pages}
        places = self._choose(prompt, kept)
        if places is None:
            return None
        ledger, free = self._ledger, dict[int, int]()
        if reservation is not None and not is_holder:
            free = {place.group: ledger.num_free(place.group) for place in places}
        table = ledger.reserve(request.request_id, places, prompt.num_reserved, prompt.chain)
        self._router.start(table, request.num_prompt_tokens)
        if is_holder:
            self._reservation = None
        elif reservation is not None:
            taken = {group: count - ledger.num_free(group) for group, count in free.items()}
            reservation.holders[request.request_id] = taken
        return table

    def _choose(self, prompt: RequestState, kept: Mapping[int, int]) -> list[Place] | None:
        """Places for a request, if it can have them now; and what they hold of its prompt."""
        request, prefixes = prompt.request, self._prefixes
        if prompt.chain is None or prefixes is None:
            return self._router.choose(prompt.num_reserved, kept=kept)
        num_cacheable = prefixes.num_cacheable(request)
        places = self._router.choose(
            prompt.num_reserved, kept=kept, chain=prompt.chain, num_cacheable=num_cacheable
        )
        if places is None:
            self._note_needed(prompt, prompt.num_reserved)
            return None
        prompt.hit = prefixes.hit(prompt, places)
        self._note_cached(prompt, prompt.hit.num_tokens)
        return places

    def _waits_for_pages(self, prompt: RequestState, now_s: float) -> bool:
        """Return whether another request computes pages that this one would have to compute.

        It waits for a request of its class or a more urgent one, which is ahead of it, and so done
        with them sooner; but not for one that gets no chunks for as long as all should take.
        """
        if prompt.chain is None or self._prefixes is None or not self._prefixes.has_leaders:
            return False
        leader, num_common = prompt.leader, prompt.num_common
        # a thousand may wait for the same one: they look again once it has no more for them
        if leader is None or not self._prefixes.is_ahead(leader, num_common):
            prompt.leader = None
            leader = self._prefixes.leader(prompt, self._prefixes.count(prompt))
            if leader is None or leader.request.priority > prompt.request.priority:
                return False
            num_common = self._prefixes.num_common(prompt, leader)
            prompt.leader, prompt.num_common = leader, num_common
            self._note_needed(prompt, prompt.num_reserved - num_common)
        if prompt.leader_planned != leader.num_planned:  # it goes on
            prompt.leader_planned = leader.num_planned
            left_s = self._table.seconds(min(leader.num_planned, num_common), num_common)
            prompt.waits_until_s = now_s + PATIENCE * left_s + PATIENCE_S
        return now_s < prompt.waits_until_s

    def _note_needed(self, prompt: RequestState, num_needed: int) -> None:
        """Note how many tokens of free pages a waiting request needs."""
        if prompt.num_needed != num_needed:
            was_largest = prompt.num_needed == self._largest_tokens
            prompt.num_needed = num_needed
            self._queue.update(prompt)
            if was_largest:
                self._largest_tokens = self._queue.largest_tokens()
            self._largest_tokens = max(self._largest_tokens, num_needed)

    def _note_cached(self, prompt: RequestState, num_cached: int) -> None:
        """Count only what is left of a prompt."""
        prompt.num_cached = prompt.num_planned = num_cached
        self.look_up(prompt)

    def look_up(self, prompt: RequestState) -> None:
        """Note the predicted time of what is left of a prompt."""
        cached_s = self._table.at(prompt.num_cached) if prompt.num_cached else 0.0
        prompt.total_s = self._table.at(prompt.request.num_prompt_tokens) - cached_s
        done_s = self._table.at(prompt.num_planned) if prompt.num_planned else 0.0
        prompt.done_s = done_s - cached_s

    def _kept(self, reservation: Reservation, group: int) -> int:
        """Free pages of a group that others must leave."""
        num_pages = self._ledger.group_pages[group]
        for_others = num_pages - reservation.pages[group] - reservation.held(group)
        return max(0, self._ledger.num_free(group) - for_others)

    def _new_reservation(self, overdue: list[RequestState]) -> Reservation | None:
        """That of the first request for which there is no room, if there is one."""
        for prompt in overdue:
            num_tokens = prompt.num_reserved
            if not self._router.has_room(num_tokens):
                return Reservation(prompt, self._router.best_groups(num_tokens))
        return None


def check_fits(request: Request, ledger: Ledger) -> None:
    """Refuse a request that no empty cache could hold.

    Raises:
        ValueError: with the tokens asked, the tokens that fit, and what would help.
    """
    capacity, key = ledger.max_request_tokens(), ledger.bound_by()
    place = f"the cache of {capacity} tokens"
    if key == "cache.max_tokens_per_group":
        place = f"the {capacity} tokens that the groups of the cache take of one request"
    num_output = request.params.max_tokens or 0
    if request.max_tokens > capacity:
        raise ValueError(
            f"prompt and max_tokens must fit {place}, got "
            f"{request.max_tokens - num_output} + {num_output} = "
            f"{request.max_tokens}; shorten one of them or raise {key}"
        )
