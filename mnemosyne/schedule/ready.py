"""Decodes that may run in the next step, and the work of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.work import DecodeTally, Work, WorkModel


class ReadyDecodes:
    """Decodes by request, those that wait longest at the front.

    Args:
        model: counts the work of each.
    """

    def __init__(self, model: WorkModel) -> None:
        self._model = model
        self._chunks: dict[int, Chunk] = {}
        self._tally = DecodeTally(model)  # of those

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[int]:
        """Their requests."""
        return iter(self._chunks)

    def clear(self) -> None:
        """Forget all."""
        self._chunks.clear()
        self._tally.clear()

    def add(self, chunks: Mapping[int, Chunk], rows: Sequence[tuple[int, PageTable]]) -> None:
        """Take decodes in.

        Args:
            chunks: by request.
            rows: position and page table of each.
        """
        self._chunks.update(chunks)
        self._tally.add(rows)

    def discard(self, request_id: int, table: PageTable) -> bool:
        """Forget the decode of a request; whether there was one."""
        chunk = self._chunks.pop(request_id, None)
        if chunk is not None:
            self._tally.add([(chunk.start, table)], sign=-1)
        return chunk is not None

    def take(self, share: int, states: Mapping[int, RequestState]) -> tuple[list[Chunk], Work]:
        """Take so many out, and their work by group.

        Args:
            share: how many at most.
            states: of their requests.
        """
        if not self._chunks:
            return [], self._model.nothing
        if share >= len(self._chunks):
            chunks, work = list(self._chunks.values()), self._tally.work()
            self.clear()
            return chunks, work
        return self.take_these(list(islice(self._chunks.values(), share)), states)

    def take_these(
        self, chunks: list[Chunk], states: Mapping[int, RequestState]
    ) -> tuple[list[Chunk], Work]:
        """Take some of them out, and their work by group."""
        self._tally.add(_rows(chunks, states), sign=-1)
        for chunk in chunks:
            del self._chunks[chunk.request_id]
        return chunks, self.work_of(chunks, states)

    def chunks(self) -> list[Chunk]:
        """All of them, those that wait longest at the front."""
        return list(self._chunks.values())

    def work(self) -> Work:
        """The work of all of them, by group."""
        return self._tally.work()

    def work_of(self, chunks: Sequence[Chunk], states: Mapping[int, RequestState]) -> Work:
        """The work of some decodes, by group."""
        tally = DecodeTally(self._model)
        tally.add(_rows(chunks, states))
        return tally.work()


def _rows(
    chunks: Sequence[Chunk], states: Mapping[int, RequestState]
) -> list[tuple[int, PageTable]]:
    return [(chunk.start, states[chunk.request_id].table) for chunk in chunks]
