"""Cached prefixes in planning: what they save, and which request computes which page next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from mnemosyne.cache.chain import Chain, seed_of
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place
from mnemosyne.request import Request
from mnemosyne.schedule.plan import Hit, PageCopy, Plan
from mnemosyne.schedule.request_state import RequestState

LONG_TOKENS = 4096  # of a prompt of which it is told where the cache missed
SHOWN_TOKENS = 24  # of the nearest cached prompt, where they differ


class Prefixes:
    """Follows the pages of requests: which are whole and may be shared, and which will be soon.

    A page is shared once the step that filled it is back and all of it was finite.

    Args:
        ledger: of pages, which shares them.
        fingerprint: tells models apart.

    Attributes:
        on_whole: told of a request of which more pages are whole than before.
    """

    def __init__(self, ledger: Ledger, fingerprint: bytes) -> None:
        self._ledger = ledger
        self._fingerprint = fingerprint
        self.on_whole: Callable[[RequestState], None] | None = None
        self._leaders: dict[bytes, RequestState] = {}  # by digest of the page that is next

    def chain_of(self, request: Request) -> Chain:
        """The tokens of a request; other models and other salts share nothing with it."""
        return self.chain_by(request, self._ledger.page_size)

    def chain_by(self, request: Request, num_tokens: int) -> Chain:
        """The same in pages of another size."""
        seed = seed_of(self._fingerprint, request.params.cache_salt)
        return Chain(seed, request.prompt_ids, num_tokens)

    def num_cacheable(self, request: Request) -> int:
        """Pages that need not be computed if they are known: one token is left to sample from."""
        if request.params.prompt_logprobs is not None:
            return 0  # every row is to be reported
        return (request.num_prompt_tokens - 1) // self._ledger.page_size

    def count(self, state: RequestState) -> int:
        """Pages of a prompt that are known now, by their digests."""
        assert state.chain is not None
        first, stop = 0, self.num_cacheable(state.request)
        groups = set(self._ledger.groups)
        for size in self._ledger.shard_pages(state.num_reserved):
            end = min(first + size, stop)
            found = {g: self._ledger.count(g, state.chain, first, end) for g in groups}
            best = max(found, key=lambda group: found[group])
            first += found[best]
            if found[best] < size or first == stop:
                break
            groups.remove(best)
        if not self._ledger.kinds.windows:
            return first
        stop = first if self._ledger.kinds.keeps else stop
        chain, groups = state.chain, set(self._ledger.groups)
        return max(self._ledger.last_end(group, chain, stop) for group in groups)

    @property
    def has_leaders(self) -> bool:
        """Return whether any page is being computed that a request might wait for."""
        return bool(self._leaders)

    def leader(self, state: RequestState, num_known: int) -> RequestState | None:
        """Whoever computes the next page of a prompt of which so many are known."""
        assert state.chain is not None
        if num_known >= self.num_cacheable(state.request):
            return None
        if self._ledger.kinds.windows:
            return self._leader_to_end(state, num_known)
        return self._leaders.get(state.chain.digests[num_known])

    def _leader_to_end(self, state: RequestState, num_known: int) -> RequestState | None:
        """Whoever will have the windows kept that a prompt needs furthest on."""
        assert state.chain is not None
        if self._leaders:
            for page in range(self.num_cacheable(state.request), num_known, -1):
                leader = self._leaders.get(state.chain.digests[page - 1])
                if leader is not None:
                    return leader
        return None

    def is_ahead(self, leader: RequestState, num_tokens: int) -> bool:
        """Return whether a request still computes pages below ``num_tokens`` that will be known."""
        return self._leaders.get(leader.leads) is leader and leader.num_computed < num_tokens

    def num_common(self, state: RequestState, leader: RequestState) -> int:
        """Tokens of full pages that a prompt may have of another that is computed."""
        assert state.chain is not None
        assert leader.chain is not None
        ours, theirs = state.chain.digests, leader.chain.digests
        num_theirs = leader.request.num_prompt_tokens // self._ledger.page_size
        stop = min(self.num_cacheable(state.request), num_theirs)
        low, high = 0, stop  # equal at a page means equal at all before it
        while low < high:
            middle = (low + high + 1) // 2
            if ours[middle - 1] == theirs[middle - 1]:
                low = middle
            else:
                high = middle - 1
        return low * self._ledger.page_size

    def hit(self, state: RequestState, places: Sequence[Place]) -> Hit:
        """The part of a prompt that the chosen places hold, and where the nearest differs."""
        request, page_size = state.request, self._ledger.page_size
        num_pages = self._ledger.num_shared(places)
        what = request.request_id, num_pages * page_size
        place = self._missing(state, places, num_pages)
        if place is None or state.chain is None:
            return Hit(*what)
        nearest = self._ledger.nearest(place.group, state.chain, num_pages)
        if nearest is None or nearest.num_equal == len(state.chain.beginning(num_pages)):
            return Hit(*what)
        shown = nearest.tokens[nearest.num_equal :][:SHOWN_TOKENS]
        return Hit(*what, num_pages * page_size + nearest.num_equal, tuple(shown.tolist()))

    def _missing(
        self, state: RequestState, places: Sequence[Place], num_known: int
    ) -> Place | None:
        """Where the first page of a long prompt would be that is not known, None if it is short."""
        request, first = state.request, 0
        if request.num_prompt_tokens < LONG_TOKENS or num_known >= self.num_cacheable(request):
            return None
        sizes = self._ledger.shard_sizes(state.num_reserved)
        for place, size in zip(places, sizes, strict=True):
            if num_known < first + size:
                return place
            first += size
        return None

    def start(self, state: RequestState) -> None:
        """Take note of a request that has pages now."""
        state.num_computed = state.num_cached
        self._lead(state)

    def complete(
        self, plan: Plan, states: Mapping[int, RequestState], broken: Collection[int]
    ) -> None:
        """Take note that a step is back: pages that its prefills filled may be shared.

        Args:
            plan: the step.
            states: of all requests, before what it sampled is entered.
            broken: whose keys or values may not be finite.
        """
        for request_id in broken:
            state = states[request_id]
            if state.chain is not None and not state.is_broken:
                self._catch_up(state)
                state.is_broken = True
                self._follow(state)
        for chunk in plan.chunks[plan.num_decodes :]:
            state = states[chunk.request_id]
            if state.chain is not None and not state.is_broken:
                self.advance(state, chunk.stop)

    def advance(self, state: RequestState, stop: int) -> None:
        """Take note that the keys and values of a prompt are there up to a position."""
        assert state.chain is not None
        page_size = self._ledger.page_size
        before, state.num_computed = state.num_computed, stop
        if stop == state.request.num_prompt_tokens and self._ledger.kinds.windows:
            self._ledger.publish(state.request.request_id, state.chain, stop)
            self._ledger.keep_end(state.request.request_id, state.chain, self._end(state))
            self._follow(state)
        elif before // page_size != stop // page_size:
            self._ledger.publish(state.request.request_id, state.chain, stop)
            self._lead(state)
            self._tell(state)

    def fill(self, state: RequestState) -> None:
        """Take note that a decode filled a page, once what it sampled is entered."""
        if state.chain is not None and not state.is_broken:
            self._catch_up(state)
            self._ledger.publish(state.request.request_id, state.chain, state.num_computed)
            self._tell(state)

    def end(self, state: RequestState) -> None:
        """Give the pages of a request back; those that are whole stay for others."""
        self._follow(state)
        self._catch_up(state)
        what = state.request.request_id, state.chain, state.num_computed
        self._ledger.release(*what, is_whole=not state.is_broken)
        self._tell(state)

    def copies(self) -> tuple[PageCopy, ...]:
        """Pages that move before the next step."""
        moved = self._ledger.take_moved()
        return tuple([PageCopy(g, tuple(a.tolist()), tuple(b.tolist())) for g, a, b in moved])

    def _end(self, state: RequestState) -> int:
        """Pages of a prompt after which its windows are kept: the same prompt finds them."""
        return (state.request.num_prompt_tokens - 1) // self._ledger.page_size

    def _catch_up(self, state: RequestState) -> None:
        """Count the tokens that decodes computed since this was last asked: all but the newest."""
        if state.is_broken or not state.outputs:
            return
        assert state.chain is not None
        state.num_computed = state.request.num_prompt_tokens + len(state.outputs) - 1
        for token_id in state.outputs[state.num_chained : -1]:
            state.chain.append(token_id)
        state.num_chained = len(state.outputs) - 1

    def clear(self) -> None:
        """Forget who computes what."""
        self._leaders.clear()

    def _tell(self, state: RequestState) -> None:
        if self.on_whole is not None:
            self.on_whole(state)

    def _lead(self, state: RequestState) -> None:
        """Let others know which page of its prompt a request computes next."""
        assert state.chain is not None
        self._follow(state)
        if self._ledger.kinds.windows:
            is_new = self._end(state) * self._ledger.page_size > state.num_cached
            if is_new and state.num_computed < state.request.num_prompt_tokens:
                state.leads = state.chain.digests[self._end(state) - 1]
                self._leaders.setdefault(state.leads, state)
            return
        page = self._ledger.num_known(state.request.request_id)
        is_next = page == state.num_computed // self._ledger.page_size
        if is_next and page < state.request.num_prompt_tokens // self._ledger.page_size:
            state.leads = state.chain.digests[page]
            self._leaders.setdefault(state.leads, state)

    def _follow(self, state: RequestState) -> None:
        if self._leaders.get(state.leads) is state:
            del self._leaders[state.leads]
