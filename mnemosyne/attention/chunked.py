"""Chunked-local attention: a row sees the keys of its own chunk of positions, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mnemosyne.attention.segments import AttentionBackend, AttentionBatch, Segment


class Chunked(NamedTuple):
    """Of a layer: a row at position p sees key j if j <= p and both lie in one chunk."""

    size: int  # positions of a chunk, a multiple of the page size


Reach = int | None | Chunked  # what a layer sees: a window, everything, or its own chunk


def prepare(
    backend: AttentionBackend, batch: AttentionBatch, reach: Reach, device: torch.device
) -> Any:
    """A batch as a backend prepares it for layers of one reach; see ``AttentionBackend``."""
    if isinstance(reach, Chunked):
        return backend.prepare(cut(batch, reach.size), None, device)
    return backend.prepare(batch, reach, device)


def cut(batch: AttentionBatch, size: int) -> AttentionBatch:
    """The same rows in segments that lie in one chunk each and have its keys alone.

    Args:
        batch: of a step.
        size: positions of a chunk.
    """
    batch = batch.of_kept_keys()
    pieces = (piece for segment in batch.segments for piece in _pieces(segment, size, batch))
    return replace(batch, segments=tuple(pieces))


def _pieces(segment: Segment, size: int, batch: AttentionBatch) -> Iterator[Segment]:
    start, stop = segment.first_position, segment.first_position + segment.num_rows
    while start < stop:
        chunk = start - start % size
        end = min(stop, chunk + size)
        first_key = max(segment.first_key, chunk)
        num_keys = min(segment.first_key + segment.num_keys, end) - first_key
        skipped = first_key - segment.first_key
        assert skipped % batch.page_size == 0, "chunks begin where pages do"
        if num_keys > 0:  # else another group holds the chunk, and the rows are padding here
            num_pages = skipped // batch.page_size
            yield segment._replace(
                first_row=segment.first_row + start - segment.first_position,
                num_rows=end - start,
                first_position=start,
                num_keys=num_keys,
                pages=segment.pages[num_pages:],
                first_key=first_key,
                first_page=segment.first_page + num_pages,
            )
        start = end
