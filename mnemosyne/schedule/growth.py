"""Requests whose end is not known: pages come as they grow, and some are set back for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from mnemosyne.cache.ledger import Ledger
from mnemosyne.request import Request
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.request_state import RequestState


class Growth:
    """Decodes that wait for a page, and the choice of the request that gives pages up.

    A request without ``max_tokens`` has pages for its prompt and the output that is expected of
    it; then it grows page by page. Where none is free, the one with most time to spare is set
    back: it gives its pages up, and computes its prompt and output again when there is room. It
    then asks for twice the output as before, so that it is set back a few times at most.

    Args:
        ledger: the pages of the cache.
        expected_tokens: of an output whose end is not known.
        reclaim: frees pages that nobody needs, and tells if there were any.
    """

    def __init__(
        self, ledger: Ledger, expected_tokens: int, reclaim: Callable[[], bool] = lambda: False
    ) -> None:
        self._ledger = ledger
        self._reclaim = reclaim
        self._expected_tokens = expected_tokens
        self.stalled: dict[int, Chunk] = {}  # decodes without a page for their token

    def num_reserved(self, request: Request, num_set_back: int = 0) -> int:
        """Tokens that pages are reserved for when a request is admitted."""
        if not request.is_open:
            return request.max_tokens
        expected = self._expected_tokens << num_set_back
        return min(request.max_tokens, request.num_prompt_tokens + expected)

    def has_page(self, state: RequestState, position: int) -> bool:
        """Tell if a request has a page for one more token."""
        return self._ledger.has_room(state.table, position)

    def grow(self, state: RequestState) -> Chunk | None:
        """Give a stalled request one more page.

        Returns:
            Its decode, which may run now; None if no page is free.
        """
        table = self._ledger.grow(state.request.request_id)
        if table is None and self._reclaim():
            table = self._ledger.grow(state.request.request_id)
        if table is None:
            return None
        state.table = table
        return self.stalled.pop(state.request.request_id)

    def in_order(self, states: dict[int, RequestState]) -> list[RequestState]:
        """Stalled requests, those that are due first at the front."""
        return sorted((states[i] for i in self.stalled), key=lambda state: state.due_s)

    def victim(self, states: Iterable[RequestState], ready: Iterable[int]) -> RequestState | None:
        """Choose the request that gives its pages up: of those in no step, the one due last.

        Args:
            states: of all requests.
            ready: requests whose decodes may run.
        """
        idle = {*ready, *self.stalled}
        may = [s for s in states if self._may_be_set_back(s, idle)]
        return max(may, key=lambda state: (state.due_s, state.ticket), default=None)

    def again(self, state: RequestState) -> Request:
        """A request that is set back, as it is from now on: its output is part of its prompt."""
        request = state.request
        assert state.outputs is not None, "they are kept of requests without an end"
        ids = np.concatenate([request.prompt_ids, np.array(state.outputs, dtype=np.int64)])
        num_given = request.num_given + len(state.outputs)
        return replace(request, prompt_ids=ids, num_given=num_given)

    def _may_be_set_back(self, state: RequestState, idle: set[int]) -> bool:
        request = state.request
        # what is reported of a prompt is reported once
        if not request.is_open or not state.table.extents or state.is_released:
            return False
        if request.params.prompt_logprobs is not None:
            return False
        if state.is_prefilling:
            return state.num_in_flight == 0
        return request.request_id in idle
