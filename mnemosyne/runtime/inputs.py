"""A plan becomes tensors: packed ids, positions, slots, and what each row may see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention.handing import HandedRows
from mnemosyne.attention.segments import AttentionBatch, Segment
from mnemosyne.attention.shared_rows import SharedRows
from mnemosyne.cache.layout import slots_of
from mnemosyne.cache.page_ids import PageIds
from mnemosyne.cache.pages import PagePool
from mnemosyne.cache.table import Held, PageTable
from mnemosyne.parallel.feed_forward import WideRows
from mnemosyne.runtime.handed import handed_rows
from mnemosyne.runtime.rings import RingChunk, TrackRows, ring_rows
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.schedule.plan import Chunk, Plan

SMALLEST_MULTIPLE = 8  # powers of two below it
BUCKETS_PER_DOUBLING = 32  # at most 1/32 of a long step is padding

FirstRows = Mapping[tuple[int, int], int]  # of chunks, by request and first position


class PlacedChunk(NamedTuple):
    """A chunk of the plan that this rank computes, and where its rows are."""

    chunk: Chunk
    first_row: int

    @property
    def last_row(self) -> int:
        """The row of its last token, which is the one that samples."""
        return self.first_row + self.chunk.num_tokens - 1


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """Tensors of one step, T rows with padding; padding rows write to the pool's spare page."""

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64, where each row's K and V go
    batch: AttentionBatch  # rows whose keys are all here
    chunks: tuple[PlacedChunk, ...]  # those of the plan that this group takes part in
    shared: SharedRows | None = None  # rows that other groups compute as well
    wide: WideRows | None = None  # how rows of all groups meet in a wide MLP
    handed: HandedRows | None = None  # slices that pass between this group and others
    rings: tuple[TrackRows, ...] = ()  # the rows in each track of layers that forget
    keeps: bool = True  # whether there are layers that keep every key

    @property
    def tracks(self) -> tuple[TrackRows, ...]:
        """The rows as the layers of each track see them."""
        if not self.keeps:
            return self.rings
        shared = self.shared.batch if self.shared else None
        return (TrackRows(self.slots_T, self.batch, shared), *self.rings)


def bucket_size(num_tokens: int) -> int:
    """Rows that a step of ``num_tokens`` tokens is padded to: few shapes, little waste."""
    power = 1 << (num_tokens - 1).bit_length()
    if power <= SMALLEST_MULTIPLE:
        return power
    multiple = max(SMALLEST_MULTIPLE, power // 2 // BUCKETS_PER_DOUBLING)
    return -(-num_tokens // multiple) * multiple


def count_rows(plan: Plan, tables: Mapping[int, PageTable], group: int) -> int:
    """T of a step on one group, padding included. The tokens need not be known yet."""
    num_tokens = 0
    for chunk in plan.chunks:
        if tables[chunk.request_id].lane(chunk.group).held_by(group, chunk.stop) is not None:
            num_tokens += chunk.num_tokens
    return bucket_size(max(num_tokens, 1))


def build_inputs(
    plan: Plan,
    sequences: Mapping[int, SequenceState],
    *,
    group: int = 0,
    num_groups: int = 1,
    is_wide: bool = False,
    page_size: int,
    padding_slot: int,
    page_ids: PageIds,
    device: torch.device,
    pool: PagePool | None = None,
) -> StepInputs:
    """Pack the chunks of a plan that one group takes part in.

    The group to which a position belongs stores its K and V; earlier ones attend to what they hold
    and store nothing.

    Args:
        plan: the step.
        sequences: state of every request in it.
        group, num_groups: index and degree on the kvp axis.
        is_wide: whether the MLP is sharded over the groups as well.
        page_size: tokens per page.
        padding_slot: where rows write that store nothing here.
        page_ids: of all this rank's sequences.
        device: where the tensors go.
        pool: with the tracks of layers that forget; None: there are none.
    """
    keeps = pool is None or pool.kinds.keeps
    packing = _Packing(group, page_size, page_ids, keeps=keeps)
    packing.add_all(plan, sequences)
    ids, positions, slots = torch.from_numpy(packing.packed(padding_slot)).to(device).unbind()
    chunks, segments = packing.chunks, packing.segments
    num_rows, shared, wide = len(ids), None, None
    shared_ids = _shared_ids(plan, sequences) if num_groups > 1 else set()
    if is_wide or shared_ids:
        first_rows = {(c.request_id, c.start): row for c, row in chunks}
    if is_wide:
        wide = _wide_rows(plan, sequences, first_rows, group, num_groups).to(device)
    handed = None
    if num_groups > 1:
        handed = handed_rows(plan, sequences, group=group, page_size=page_size, device=device)
    if shared_ids:
        common, segments = _parted(chunks, segments, shared_ids)
        batch = AttentionBatch(tuple(common), num_rows, page_size, page_ids.tensor)
        shared = _shared_rows(plan, shared_ids, first_rows, batch).to(device)
    rings = []
    if pool is not None and pool.kinds.windows:
        parts = _with_rings(chunks, sequences, group)
        rings = ring_rows(pool, parts, num_rows, shared_ids if shared else None, device)
    return StepInputs(
        token_ids_T=ids,
        positions_T=positions,
        slots_T=slots,
        batch=AttentionBatch(tuple(segments), num_rows, page_size, page_ids.tensor),
        chunks=tuple(chunks),
        shared=shared,
        wide=wide,
        handed=handed,
        rings=tuple(rings),
        keeps=keeps,
    )


def _with_rings(
    chunks: list[PlacedChunk], sequences: Mapping[int, SequenceState], group: int
) -> list[RingChunk]:
    """The chunks of requests whose windows are on one group."""
    found = []
    for chunk, first_row in chunks:
        rings = sequences[chunk.request_id].table.rings_on(group)
        if rings:
            assert chunk.group is None, "layers that forget are on one group: nothing is cut"
            found.append(RingChunk(chunk, first_row, rings))
    return found


def _parted(
    chunks: list[PlacedChunk], segments: list[Segment], shared_ids: set[int]
) -> tuple[list[Segment], list[Segment]]:
    """Segments of requests that several groups compute, and those of all others."""
    common: list[Segment] = []
    own: list[Segment] = []
    for placed, segment in zip(chunks, segments, strict=True):
        (common if placed.chunk.request_id in shared_ids else own).append(segment)
    return common, own


class _Packing:
    """Packs the chunks that one group takes part in, one after the other.

    Args:
        group: index on the kvp axis.
        page_size: tokens per page.
        page_ids: of all sequences of this rank.
        keeps: whether there are layers that keep every key.
    """

    def __init__(
        self, group: int, page_size: int, page_ids: PageIds, *, keeps: bool = True
    ) -> None:
        self.chunks: list[PlacedChunk] = []
        self.segments: list[Segment] = []  # what the rows of each may see
        self._group = group
        self._page_size = page_size
        self._page_ids = page_ids
        self._keeps = keeps
        self._num_rows = 0
        self._decodes: list[tuple[int, int, int, int]] = []  # row, id, position, slot
        self._views: list[tuple[int, _LocalView]] = []  # first row and view of the other chunks

    def add_all(self, plan: Plan, sequences: Mapping[int, SequenceState]) -> None:
        """Take in the chunks of a plan that the group takes part in."""
        for chunk in plan.chunks:
            self.add(chunk, sequences[chunk.request_id])

    def add(self, chunk: Chunk, sequence: SequenceState) -> None:
        """Take a chunk in, if the group takes part in it."""
        row, table = self._num_rows, sequence.table
        if chunk.group is not None:
            table = table.lane(chunk.group)
        if self._keeps and chunk.token_id is not None and len(table.extents) == 1:
            # A step may hold a thousand of these.
            start, extent = chunk.start, table.extents[0]
            if extent.group != self._group:
                return
            page, offset = divmod(start, self._page_size)
            slot = int(extent.pages[page]) * self._page_size + offset
            self._decodes.append((row, chunk.token_id, start, slot))
            first_page = self._page_ids.first(chunk.request_id)
            segment = Segment(row, 1, start, start + 1, extent.pages, 0, first_page)
        else:
            view = _local_view(chunk, sequence, table, self._group)
            if view is None:
                return
            self._views.append((row, view))
            (extent, keys), first_page = view.held, self._page_ids.first(chunk.request_id)
            seen = chunk.start, len(keys), extent.pages, extent.start, first_page
            segment = Segment(row, chunk.num_tokens, *seen)
        self.chunks.append(PlacedChunk(chunk, row))
        self.segments.append(segment)
        self._num_rows += chunk.num_tokens

    def packed(self, padding_slot: int) -> np.ndarray:
        """Ids, positions and slots of the rows, padding included, int64 ``[3, T]``."""
        packed = np.zeros((3, bucket_size(max(1, self._num_rows))), dtype=np.int64)
        packed[2] = padding_slot
        if self._decodes:
            rows, *columns = np.array(self._decodes).T
            packed[:, rows] = columns
        for row, view in self._views:
            _pack(packed, row, view, self._page_size, stores=view.stores and self._keeps)
        return packed


def _pack(packed: np.ndarray, row: int, view: _LocalView, page_size: int, *, stores: bool) -> None:
    """Enter the ids, positions and slots of a chunk, from a row on."""
    chunk = view.chunk
    rows = slice(row, row + chunk.num_tokens)
    packed[0, rows] = view.sequence.tokens[chunk.start : chunk.stop]
    packed[1, rows] = np.arange(chunk.start, chunk.stop)
    if stores:
        extent = view.held.extent
        first = chunk.start - extent.start
        packed[2, rows] = slots_of(extent.pages, first, chunk.num_tokens, page_size)


def _shared_ids(plan: Plan, sequences: Mapping[int, SequenceState]) -> set[int]:
    """The requests whose rows several groups compute."""
    return {
        chunk.request_id
        for chunk in plan.chunks
        if chunk.group is None and sequences[chunk.request_id].table.num_holding(chunk.stop) > 1
    }


def _shared_rows(
    plan: Plan, shared_ids: set[int], first_rows: FirstRows, batch: AttentionBatch
) -> SharedRows:
    """The rows that several groups compute, counted alike on every group."""
    local, exchange, num_rows = [], [], 0
    for chunk in plan.chunks:
        if chunk.request_id not in shared_ids:
            continue
        first_row = first_rows.get((chunk.request_id, chunk.start))
        if first_row is not None:
            local.append(_rows(first_row, chunk))
            exchange.append(_rows(num_rows, chunk))
        num_rows += chunk.num_tokens
    return SharedRows(num_rows, _joined(local), _joined(exchange), batch)


def _wide_rows(
    plan: Plan,
    sequences: Mapping[int, SequenceState],
    first_rows: FirstRows,
    group: int,
    num_groups: int,
) -> WideRows:
    """Each row is sent by the reporter of its lane, which always computes it."""
    num_sent = [0] * num_groups
    owned, local, gathered = [], [], []  # gathered: (owner, rows of what the owner sends)
    for chunk in plan.chunks:
        owner = sequences[chunk.request_id].table.lane(chunk.group).reporter
        first_row = first_rows.get((chunk.request_id, chunk.start))
        if first_row is not None:
            rows = _rows(first_row, chunk)
            local.append(rows)
            gathered.append((owner, _rows(num_sent[owner], chunk)))
            if owner == group:
                owned.append(rows)
        num_sent[owner] += chunk.num_tokens
    stride = bucket_size(max(num_sent))
    return WideRows(
        num_sent=stride,
        owned_rows=_joined(owned),
        local_rows=_joined(local),
        gathered_rows=_joined([owner * stride + rows for owner, rows in gathered]),
    )


def _rows(first: int, chunk: Chunk) -> np.ndarray:
    return np.arange(first, first + chunk.num_tokens, dtype=np.int64)


def _joined(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([*parts, np.empty(0, dtype=np.int64)]))


class _LocalView(NamedTuple):
    """The part of one group in a chunk."""

    chunk: Chunk
    sequence: SequenceState
    held: Held  # once the chunk is computed
    stores: bool  # whether the chunk's own keys are among them


def _local_view(
    chunk: Chunk, sequence: SequenceState, table: PageTable, group: int
) -> _LocalView | None:
    assert chunk.stop <= sequence.num_tokens, "a chunk holds only tokens that exist"
    held = table.held_by(group, chunk.stop)
    if held is None:
        return None
    stores = table.storing(chunk.start) is held.extent
    return _LocalView(chunk=chunk, sequence=sequence, held=held, stores=stores)
