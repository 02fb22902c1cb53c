"""Requests that wait for pages or a place: who is let in next, and that everyone is in the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf

from mnemosyne.cache.layout import Placement
from mnemosyne.config import SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.policy import POLICIES
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.prompts import NOWHERE, Progress, Prompts
from mnemosyne.schedule.routing import NOTHING, Router

FOREVER_S = 1e9  # three decades: later deadlines are no less urgent, and slack stays finite


@dataclass(slots=True)
class Claim:
    """Pages that one overdue request will get, whoever comes before it until then.

    Others may take pages of its groups only as long as it would fit beside them. Those that were
    there before end, so it fits in the end.
    """

    prompt: Progress
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
        self._prompts = Prompts(POLICIES[policy], table)
        self._most_room: float = 0  # tokens of the largest request
        self._claim: Claim | None = None
        self._is_settled = True  # nothing changed since everyone was tried

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, request: Request) -> Progress:
        """Queue a request; how far it is tells when its first token is due."""
        self._table.extend(request.num_prompt_tokens)
        deadline_s, arrival_s = request.deadline_s, request.arrival_s
        if deadline_s is None:
            alone_s = self._table.seconds(0, request.num_prompt_tokens)
            deadline_s = max(float(self._slo.ttft_min), self._slo.ttft_scale * alone_s)
        total_s = self._table.at(request.num_prompt_tokens)
        due_s = arrival_s + min(deadline_s, FOREVER_S)
        prompt = Progress(arrival_s, due_s, total_s, 0.0, request, deadline_s)
        self._prompts.add(prompt)
        self._most_room = max(self._most_room, request.max_tokens)
        self._is_settled = False
        return prompt

    def discard(self, prompt: Progress) -> None:
        """Forget a request that waits here."""
        self._remove([self._prompts.find(prompt)])
        if self._claim is not None and self._claim.prompt is prompt:
            self._claim = None
        self._is_settled = False

    def note_release(self, request_id: int) -> None:
        """Take note that an admitted request gave its pages and its place back."""
        if self._claim is not None:
            self._claim.holders.pop(request_id, None)
        self._is_settled = False

    def clear(self) -> None:
        """Forget all."""
        self._prompts.clear()
        self._most_room = 0
        self._claim = None

    def admit(self, num_places: int, now_s: float) -> list[Progress]:
        """Let requests in, at most ``num_places``; their pages are reserved."""
        if self._is_settled or num_places <= 0 or not self._prompts:
            return []
        self._is_settled = True
        admitted: list[Progress] = []
        for prompt in self._order(now_s):
            if prompt.placement is not NOWHERE:
                continue
            placement = self._place(prompt.request)
            if placement is not None:
                prompt.placement = placement
                admitted.append(prompt)
                if len(admitted) == num_places:
                    break
            elif not self._may_pass:
                break
        self._remove(admitted)
        return admitted

    def _remove(self, prompts: list[Progress]) -> None:
        self._prompts.remove(prompts)
        if any(prompt.request.max_tokens == self._most_room for prompt in prompts):
            self._most_room = self._prompts.most_room()

    def _order(self, now_s: float) -> Iterator[Progress]:
        """Those that may fit, the first to be let in first; the claimant may come twice."""
        factor = self._prompts.follow_table()
        most_free, most_per_group = (
            self._router.most_free_tokens(),
            self._router.max_tokens_per_group,
        )
        at_once = min(most_free, most_per_group)  # tokens of the largest shard that is sure to fit
        if not self._may_pass or self._most_room <= at_once:
            order = self._prompts.in_order(now_s, factor)
        else:
            if self._claim is None:
                self._claim = self._new_claim(self._prompts.overdue(now_s, factor, at_once))
            # what needs several shards may fit where one fits
            fits = inf if most_free >= most_per_group else most_free
            order = self._prompts.in_order(now_s, factor, fits)
        if self._claim is None:
            return order
        return chain([self._prompts.find(self._claim.prompt)], order)

    def _place(self, request: Request) -> Placement | None:
        claim, kept = self._claim, NOTHING
        is_claimant = claim is not None and claim.prompt.request is request
        if (
            claim is not None
            and not is_claimant
            and claim.prompt.request.priority <= request.priority
        ):
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

    def _new_claim(self, overdue: list[Progress]) -> Claim | None:
        """That of the first request for which there is no room, if there is one."""
        for prompt in overdue:
            num_tokens = prompt.request.max_tokens
            if not self._router.has_room(num_tokens):
                return Claim(prompt, self._router.best_groups(num_tokens))
        return None
