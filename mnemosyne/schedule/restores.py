"""Prompts whose beginning comes from the disk: read beside the work, restored, then computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter

from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.plan import Fetch, Plan, Restore
from mnemosyne.schedule.prefixes import Prefixes
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.saves import Disk, Saves

PIECE_BYTES = 32 << 20  # of a rank, that are restored in a step without other work
PIECE_BYTES_BESIDE = 4 << 20  # the same in a step with rows to compute
READ_BYTES_PER_S, LEAF_S = 1e9, 1e-4  # of a disk, before any was read
LEARNED = 0.3  # share of a new measurement in the expectation


@dataclass(slots=True, eq=False)
class _Restoring:
    """One prompt whose leaves are read: ``first`` is a leaf of it, the rest count from there."""

    state: RequestState
    first: int
    num_leaves: int  # less once one was not whole
    from_position: int  # what is before it was there already
    started_s: float
    num_planned: int = 0
    num_done: int = 0
    num_in_flight: int = 0  # pieces


class Restores:
    """Admitted prompts that wait for their leaves.

    They have their pages. What is restored is verified on every rank before anybody else may find
    it; from the first leaf on that is not whole, a prompt is computed.

    Args:
        disk: where leaves are.
        saves: knows the leaves of requests.
        prefixes: are told what is restored.
        advance: tells the router that less of a prompt is left.
        compute_s: predicted seconds of a prompt between two positions.
    """

    def __init__(
        self,
        disk: Disk,
        saves: Saves,
        prefixes: Prefixes,
        advance: Callable[[PageTable, int, int], None],
        compute_s: Callable[[int, int], float],
    ) -> None:
        self._disk = disk
        self._saves = saves
        self._prefixes = prefixes
        self._advance = advance
        self._compute_s = compute_s
        self._leaf_tokens = disk.folder.layout.leaf_tokens
        self._leaf_s = disk.folder.layout.leaf_bytes / READ_BYTES_PER_S + LEAF_S
        self._fetches: list[Fetch] = []
        self._restoring: dict[int, _Restoring] = {}  # by request, in the order of admission

    def __len__(self) -> int:
        return len(self._restoring)

    def begin(self, state: RequestState) -> bool:
        """Have the leaves of an admitted prompt read, if that is sooner than computing them."""
        request, folder = state.request, self._disk.folder
        if state.chain is None or request.params.prompt_logprobs is not None:
            return False
        leaves = self._saves.leaves_of(state)
        first, stop = (
            n // self._leaf_tokens for n in (state.num_cached, len(request.prompt_ids) - 1)
        )
        num_leaves = 0
        while first + num_leaves < stop and folder.has(leaves.digests[first + num_leaves]):
            num_leaves += 1
        end = (first + num_leaves) * self._leaf_tokens
        if end <= state.num_cached:
            return False
        if num_leaves * self._leaf_s >= self._compute_s(state.num_cached, end):
            return False
        digests = tuple(leaves.digests[first : first + num_leaves])
        self._disk.note_used(leaves.digests[: first + num_leaves])
        self._restoring[request.request_id] = _Restoring(
            state, first, num_leaves, state.num_cached, perf_counter()
        )
        parts = tuple(folder.parts(digest) for digest in digests)
        start = first * self._leaf_tokens
        fetch = Fetch(request.request_id, start, leaves.before(first), digests, parts)
        self._fetches.append(fetch)
        return True

    def fetches(self) -> tuple[Fetch, ...]:
        """The leaves that are read from now on."""
        fetches, self._fetches = tuple(self._fetches), []
        return fetches

    def take(self, *, has_others: bool) -> list[Restore]:
        """The pieces that are restored in a step.

        Args:
            has_others: whether the step computes rows: those wait for no disk.
        """
        left = max(1, (PIECE_BYTES_BESIDE if has_others else PIECE_BYTES) // self._disk.local_bytes)
        pieces = list[Restore]()
        for request_id, own in self._restoring.items():
            count = self._disk.num_ready(request_id, own.num_planned)
            if not has_others and not pieces:
                count = left  # nothing else is to be done
            count = min(count, left, own.num_leaves - own.num_planned)
            if count:
                pieces.append(self._piece(own, count))
                left -= count
        return pieces

    def complete(
        self, plan: Plan, restored: Mapping[int, int], states: Mapping[int, RequestState]
    ) -> list[RequestState]:
        """Take note that the pieces of a step are there.

        Args:
            plan: the step.
            restored: of each request, how many leaves of its piece were whole.
            states: of all requests.

        Returns:
            Those that are at their end, to be computed from there on or forgotten.
        """
        ended = list[RequestState]()
        for request_id, first, stop, _ in plan.restores:
            state, own = states[request_id], self._restoring.get(request_id)
            state.num_in_flight -= 1
            if own is None:  # it was released
                ended += [state] if state.num_in_flight == 0 else []
                continue
            own.num_in_flight -= 1
            count = restored.get(request_id, 0) if first == own.num_done else 0
            own.num_done += count
            if first + count < stop:
                # those behind it have not been looked at, and may not be whole either
                digests = self._saves.leaves_of(state).digests
                self._saves.forget(digests[own.first + own.num_done : own.first + own.num_leaves])
                own.num_leaves = own.num_planned = own.num_done
            self._note(own)
            if own.num_done == own.num_leaves and not own.num_in_flight:
                del self._restoring[request_id]
                self._learn(own)
                ended.append(state)
        return ended

    def discard(self, state: RequestState) -> bool:
        """Forget a prompt; whether it was here."""
        return self._restoring.pop(state.request.request_id, None) is not None

    def clear(self) -> None:
        """Forget all."""
        self._restoring.clear()
        self._fetches.clear()

    def _piece(self, own: _Restoring, count: int) -> Restore:
        first, own.num_planned = own.num_planned, own.num_planned + count
        own.num_in_flight += 1
        own.state.num_in_flight += 1
        request_id = own.state.request.request_id
        return Restore(request_id, first, own.num_planned, own.from_position)

    def _note(self, own: _Restoring) -> None:
        """Have a prompt begin after its restored part."""
        state, stop = own.state, (own.first + own.num_done) * self._leaf_tokens
        if stop > state.num_planned:
            self._advance(state.table, state.num_planned, stop)
            state.num_restored += stop - state.num_planned
            self._disk.folder.counts.tokens_restored += stop - state.num_planned
            state.num_planned = state.num_cached = stop
            self._prefixes.advance(state, stop)

    def _learn(self, own: _Restoring) -> None:
        if own.num_done:
            leaf_s = (perf_counter() - own.started_s) / own.num_done
            self._leaf_s += LEARNED * (leaf_s - self._leaf_s)
