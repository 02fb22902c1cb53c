"""The leaves that go to the disk: of long prefixes, when their pages are whole, a few per step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.leaf_folder import LeafFolder
from mnemosyne.cache.ledger import Ledger
from mnemosyne.request import Request
from mnemosyne.schedule.plan import Save, SaveFrom
from mnemosyne.schedule.request_state import RequestState

MIN_LEAVES = 4  # of a prefix that is worth a file
MAX_PENDING = 1 << 16  # leaves that wait for a step
COPIED_BYTES_PER_S = 2e9  # of keys and values out of pages
SHARE_BESIDE_DECODES, SHARE = 0.01, 0.1  # of a step, for copies
HANDED_S = 60.0  # after which a leaf that is not on the disk is handed on again


class Disk(Protocol):
    """The part of rank 0's way to the disk that planning needs (see ``runtime.leaves``)."""

    @property
    def folder(self) -> LeafFolder:
        """The leaves that there are."""

    @property
    def local_bytes(self) -> int:
        """Bytes of this rank's part of a leaf."""

    @property
    def num_room(self) -> int:
        """Leaves that may be handed on now."""

    def num_ready(self, request_id: int, first: int) -> int:
        """Leaves of a request from ``first`` on that could be restored without a wait."""

    def note_used(self, digests: Sequence[bytes]) -> None:
        """Note that a chain was used."""

    def clear(self) -> None:
        """Remove all files of the model, and write nothing of what waits."""


class Saves:
    """Leaves that are whole and not on the disk, in the order in which they came to be.

    A leaf is found by its pages when its turn comes: pages that were given to others meanwhile are
    not known any more, and the leaf is left out.

    Args:
        disk: where leaves go.
        ledger: knows the pages.
        chain_by: tokens of a request by leaves.
    """

    def __init__(
        self, disk: Disk, ledger: Ledger, chain_by: Callable[[Request, int], Chain]
    ) -> None:
        self._disk = disk
        self._ledger = ledger
        self._chain_by = chain_by
        self._leaf_tokens = disk.folder.layout.leaf_tokens
        self._pending: deque[tuple[RequestState, int]] = deque()
        self._handed: dict[bytes, float] = {}  # when
        self._allowed_bytes = 0.0

    def __len__(self) -> int:
        return len(self._pending)

    def leaves_of(self, state: RequestState) -> Chain:
        """The tokens of a request by leaves, as far as they are computed."""
        if state.leaves is None:
            state.leaves = self._chain_by(state.request, self._leaf_tokens)
        num_prompt = state.request.num_prompt_tokens
        for token_id in (state.outputs or ())[state.leaves.num_tokens - num_prompt :]:
            if state.leaves.num_tokens >= state.num_computed:
                break
            state.leaves.append(token_id)
        return state.leaves

    def note(self, state: RequestState) -> None:
        """Take note that more pages of a request are whole."""
        stop = state.num_computed // self._leaf_tokens
        if stop < MIN_LEAVES or stop <= state.num_noted:
            return
        digests, folder = self.leaves_of(state).digests, self._disk.folder
        for index in range(state.num_noted, stop):
            if not folder.has(digests[index]) and len(self._pending) < MAX_PENDING:
                self._pending.append((state, index))
        state.num_noted = stop

    def take(self, step_s: float, *, delays_decodes: bool) -> list[Save]:
        """The leaves that are copied in a step.

        Args:
            step_s: predicted seconds of the step, 0 if nobody knows.
            delays_decodes: whether it has any.
        """
        if not self._pending:
            return []
        share, size = SHARE_BESIDE_DECODES if delays_decodes else SHARE, self._disk.local_bytes
        self._allowed_bytes += share * step_s * COPIED_BYTES_PER_S if step_s else size
        if not delays_decodes:
            self._allowed_bytes = max(self._allowed_bytes, size)
        count = int(self._allowed_bytes // size)
        self._allowed_bytes -= count * size
        return self.take_some(count)

    def take_some(self, count: int) -> list[Save]:
        """At most this many leaves, as far as there is room."""
        saves, count = list[Save](), min(count, self._disk.num_room)
        while self._pending and len(saves) < count:
            state, index = self._pending.popleft()
            save = self._save(state, index)
            if save is not None:
                saves.append(save)
            if state.leaves is not None and (not self._pending or self._pending[0][0] is not state):
                self._disk.note_used(state.leaves.digests[: index + 1])
        return saves

    def forget(self, digests: Sequence[bytes]) -> None:
        """Have leaves written again, even those that the disk has."""
        for digest in digests:
            self._disk.folder.forget(digest)
            self._handed.pop(digest, None)

    def clear(self) -> None:
        """Forget the leaves that wait."""
        self._pending.clear()
        self._handed.clear()

    def _save(self, state: RequestState, index: int) -> Save | None:
        assert state.leaves is not None
        digest, now_s = state.leaves.digests[index], time.monotonic()
        is_handed = now_s - self._handed.get(digest, -HANDED_S) < HANDED_S
        if is_handed or self._disk.folder.has(digest):
            return None
        sources = self._sources(state, index)
        if sources is None:
            self._disk.folder.counts.leaves_skipped += 1
            return None
        if len(self._handed) >= MAX_PENDING:
            self._handed.clear()
        self._handed[digest] = now_s
        self._disk.folder.expect(digest)
        ids = state.leaves.tokens(index, index + 1).tobytes()
        before, start = state.leaves.before(index), index * self._leaf_tokens
        return Save(digest, before, start, ids, sources)

    def _sources(self, state: RequestState, index: int) -> tuple[SaveFrom, ...] | None:
        """Pages that hold a leaf, None if one of them is not known any more."""
        assert state.chain is not None
        page_size, digests = self._ledger.page_size, state.chain.digests
        start, stop = index * self._leaf_tokens, (index + 1) * self._leaf_tokens
        sources, group = list[SaveFrom](), 0
        for page in range(start // page_size, -(-stop // page_size)):
            found = self._ledger.find(digests[page], group) if page < len(digests) else None
            if found is None:
                return None
            first, end = max(start, page * page_size), min(stop, (page + 1) * page_size)
            if sources and found[0] == group:
                last = sources[-1]
                sources[-1] = last._replace(stop=end - start, pages=(*last.pages, found[1]))
            else:
                group, offset = found[0], first - page * page_size
                sources.append(SaveFrom(group, first - start, end - start, (found[1],), offset))
        return tuple(sources)
