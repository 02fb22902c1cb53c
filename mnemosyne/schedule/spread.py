"""Prompts over several groups: the helpers, the pages they lend, and the cuts of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.table import PageTable
from mnemosyne.config import ScheduleConfig
from mnemosyne.schedule.admission import AdmissionQueue
from mnemosyne.schedule.chunking import solve_chunk
from mnemosyne.schedule.draft import ChunkCandidate, StepDraft
from mnemosyne.schedule.plan import handovers
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.routing import Router

GROUP_TOKENS = 256  # of a prompt, for each group that computes it
GAIN = 1.1  # times the rate of the home alone, below which a chunk is not cut
ROUNDS = 14  # of a bisection
LEAST_S = 1e-12  # a predictor that knows nothing yet says 0

# tokens of the slice of a group (first) that begins so many tokens on (second), within seconds
Fits = Callable[[int, int, float], int]


def cut(fits: Fits, num_groups: int, total: int, budget_s: float) -> list[int]:
    """Sizes of the slices of a chunk that end together.

    Each group gets what fits one and the same time. Where all of ``total`` fits the budget, that
    time is the shortest in which it does.

    Args:
        fits: the chunk rule; more fits in more time.
        num_groups: in the order of their slices.
        total: tokens of the chunk at most.
        budget_s: seconds that the step may take.

    Source: LoongServe and KV-Runahead cut prompts over instances; the rule is ours.
    """
    sizes = _within(fits, num_groups, budget_s)
    if sum(sizes) < total:
        return sizes
    low_s, high_s = 0.0, budget_s
    for _ in range(ROUNDS):
        middle_s = (low_s + high_s) / 2
        tried = _within(fits, num_groups, middle_s)
        if sum(tried) < total:
            low_s = middle_s
        else:
            high_s, sizes = middle_s, tried
    return sizes


def _within(fits: Fits, num_groups: int, seconds: float) -> list[int]:
    sizes: list[int] = []
    for group in range(num_groups):
        sizes.append(fits(group, sum(sizes), seconds))
    return sizes


class Spread:
    """Prompts whose chunks other groups help to compute, and the pages that these lend.

    A group helps while no prompt that lives there is left to compute. It lends pages when the
    first chunk of a prompt is planned and nobody waits for any; it has every key from then on, so
    that it may rest and help again. The pages are free one step after the prompt's last chunk, or
    as soon as somebody lacks pages.

    Args:
        ledger: the pages of each group.
        router: knows the work ahead of each group.
        config: the smallest and the largest chunk.
    """

    def __init__(self, ledger: Ledger, router: Router, config: ScheduleConfig) -> None:
        self._ledger = ledger
        self._router = router
        self._config = config
        # layers that forget have what they see on one group
        may_cut = len(ledger.groups) > 1 and not ledger.kinds.windows
        self._is_on = config.spread == "auto" and may_cut
        self._prompts: dict[int, RequestState] = {}  # with copies
        self._changed: dict[int, RequestState] = {}  # whose tables no plan has carried yet
        self._may_lend = True  # whether no request waits for pages

    def take(
        self,
        step: StepDraft,
        candidate: ChunkCandidate,
        size: int,
        *,
        within_s: float = 0.0,
        total: int | None = None,
        max_chunk: int | None = None,
    ) -> int:
        """Put the next chunk of a prompt in a step: as it is, or over all groups that help.

        Args:
            step: without it.
            candidate: the chunk on the home of the prompt alone.
            size: its tokens there.
            within_s: seconds that the step may take, if that is more than it takes there.
            total: tokens of a chunk that is cut, at most; unset: all that is left of the prompt.
            max_chunk: tokens that one group may take; unset: as configured.

        Returns:
            Tokens that one group takes at most.
        """
        prompt, home = candidate.prompt, candidate.prompt.table.reporter
        slices, helpers = [(home, size)], self.helpers(prompt, step.group_s)
        if helpers:
            alone_s = max(candidate.seconds(size), LEAST_S)
            # where a step holds no more than the smallest chunk, so does each slice of it
            least = min(self._config.min_chunk, size)
            last = ChunkCandidate(step, prompt, prompt.num_planned + least * len(helpers), home)
            within_s = max(within_s, alone_s, last.own_seconds(least))
            total = candidate.max_tokens if total is None else total
            most = max_chunk or self._config.max_chunk
            fits = self._fits(step, prompt, [*helpers, home], total, most)
            sizes = cut(fits, len(helpers) + 1, total, within_s)
            found = [(g, n) for g, n in zip([*helpers, home], sizes, strict=True) if n]
            if found and _rate(step, prompt, found) >= GAIN * size / alone_s:
                slices = found
        if not prompt.table.lent:
            if slices == [(home, size)]:
                candidate.accept(size)
                return size
            self._lend(prompt, [group for group, _ in slices if group != home])
        start = prompt.num_planned
        for group, num_tokens in slices:
            ChunkCandidate(step, prompt, start, group).accept(num_tokens)
            start += num_tokens
        handed = handovers(step.chunks[-len(slices) :], lambda _: prompt.table)
        step.num_handed += sum(handover.chunk.num_tokens for handover in handed)
        return max(num_tokens for _, num_tokens in slices)

    def admit(self, waiting: AdmissionQueue, num_running: int, now_s: float) -> list[RequestState]:
        """Let requests in; they get what groups lent to ended prompts, or to any if they lack it.

        Args:
            waiting: the requests.
            num_running: requests that were let in before.
            now_s: seconds on the clock of their arrivals.
        """
        num_places = self._config.max_sequences - num_running
        self._take_back([prompt for prompt in self._prompts.values() if not prompt.is_prefilling])
        if self._changed:
            waiting.note_room()
        admitted = waiting.admit(num_places, now_s)
        if waiting.lacks_pages and self.take_all_back():
            waiting.note_room()
            admitted += waiting.admit(num_places - len(admitted), now_s)
        self._may_lend = not waiting.lacks_pages
        return admitted

    def take_all_back(self) -> bool:
        """Take all lent pages back, because a request lacks some; return whether there were any."""
        return self._take_back(list(self._prompts.values()))

    def changed(self) -> dict[int, PageTable]:
        """Tables that changed since this was last asked, by request."""
        changed, self._changed = self._changed, {}
        return {request_id: prompt.table for request_id, prompt in changed.items()}

    def forget(self, request_id: int) -> None:
        """Forget a request that gives all its pages back."""
        self._prompts.pop(request_id, None)
        self._changed.pop(request_id, None)

    def clear(self) -> None:
        """Forget all."""
        self._prompts.clear()
        self._changed.clear()

    def helpers(self, prompt: RequestState, group_s: Sequence[float]) -> list[int]:
        """Groups that may take slices of a prompt, those with least to do in the step first."""
        table, num_tokens = prompt.table, prompt.request.num_prompt_tokens
        if table.lent:
            groups = [extent.group for extent in table.lent]
        elif self._may_begin(prompt):
            others = (group for group in self._ledger.groups if group != table.reporter)
            groups = [group for group in others if self._ledger.can_lend(group, num_tokens)]
        else:
            return []
        idle = [group for group in groups if self._router.is_idle(group)]
        return sorted(idle, key=lambda group: group_s[group])[: num_tokens // GROUP_TOKENS - 1]

    def _may_begin(self, prompt: RequestState) -> bool:
        """Return whether groups may lend pages to a prompt: they lack none of its keys yet."""
        is_whole = prompt.num_planned == 0 and len(prompt.table.extents) == 1
        is_long = prompt.request.num_prompt_tokens >= 2 * GROUP_TOKENS
        return self._is_on and self._may_lend and is_whole and is_long

    def _fits(
        self,
        step: StepDraft,
        prompt: RequestState,
        groups: Sequence[int],
        total: int,
        max_chunk: int,
    ) -> Fits:
        """The chunk rule for the slices of a chunk; each group after them has its least."""
        min_chunk = self._config.min_chunk

        def fits(index: int, before: int, seconds: float) -> int:
            left = total - before - min_chunk * (len(groups) - 1 - index)
            if left < 1:
                return 0
            start = prompt.num_planned + before
            return solve_chunk(
                ChunkCandidate(step, prompt, start, groups[index]).own_seconds,
                remaining=left,
                budget_s=seconds,
                min_chunk=min_chunk,
                max_chunk=max_chunk,
            )

        return fits

    def _lend(self, prompt: RequestState, groups: Sequence[int]) -> None:
        request = prompt.request
        table = self._ledger.lend(request.request_id, groups, request.num_prompt_tokens)
        prompt.table, self._changed[request.request_id] = table, prompt
        self._prompts[request.request_id] = prompt

    def _take_back(self, prompts: Sequence[RequestState]) -> bool:
        for prompt in prompts:
            request_id = prompt.request.request_id
            prompt.table = self._ledger.take_back(request_id)
            self._changed[request_id] = prompt
            del self._prompts[request_id]
        return bool(prompts)


def _rate(step: StepDraft, prompt: RequestState, slices: Sequence[tuple[int, int]]) -> float:
    """Predicted tokens per second of a step with these slices: group and tokens of each."""
    start, slowest_s = prompt.num_planned, LEAST_S
    for group, num_tokens in slices:
        slice_s = ChunkCandidate(step, prompt, start, group).seconds(num_tokens)
        slowest_s, start = max(slowest_s, slice_s), start + num_tokens
    return (start - prompt.num_planned) / slowest_s
