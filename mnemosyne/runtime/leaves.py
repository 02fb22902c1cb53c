"""One rank's way to the disk and back: leaves are copied out, written, read and restored.

Files are written by one thread and read by several, so that no step waits for the disk but one
that has nothing else to do.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mnemosyne.cache.chain import ID_DTYPE
from mnemosyne.cache.leaf_copies import LeafCopies
from mnemosyne.cache.leaf_file import Leaf, Part, Piece, Span
from mnemosyne.cache.leaf_folder import LeafFolder
from mnemosyne.cache.table import FAR, PageTable
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.schedule.plan import Fetch, Plan, Restore, Save

log = logging.getLogger(__name__)

QUEUED_BYTES = 256 << 20  # that wait to be written, of one rank
AHEAD_BYTES = 128 << 20  # that are read and wait for their place, of one request
NUM_READERS = 4
NICENESS = 10  # of the thread that writes: a step goes before it
IDLE_S = 2.0  # after which its thread looks for leaves that others wrote
CLOSE_S = 60.0  # for the last leaves to be written

Read = Future[list[Piece] | None]


class _Write(NamedTuple):
    leaf: Leaf
    part: Part
    pieces: list[memoryview]
    num_clears: int  # of the folder, before it was copied

    @property
    def num_bytes(self) -> int:
        return sum(len(piece) for piece in self.pieces)


@dataclass(slots=True, eq=False)
class _Reading:
    """The leaves of one request that are read, in order."""

    leaves: list[Leaf]
    parts: Sequence[tuple[str, ...]]
    wanted: list[Part | None]  # of each leaf; None: nothing of it is on this group
    reads: deque[Read] = field(default_factory=deque)  # of those from ``taken`` on
    taken: int = 0


class RankLeaves:
    """Writes and reads leaves for the layers and heads of one rank.

    Args:
        folder: of the leaves.
        copies: of this rank's pages.
        group: index on the kvp axis.
        writes: whether this rank writes: of several with the same heads, one does.
    """

    def __init__(
        self, folder: LeafFolder, copies: LeafCopies, *, group: int = 0, writes: bool = True
    ) -> None:
        self.folder = folder
        self._copies = copies
        self._group = group
        self._writes = writes
        self._readings: dict[int, _Reading] = {}
        self._queue: queue.SimpleQueue[_Write | list[bytes] | None] = queue.SimpleQueue()
        self._queued_bytes = 0
        self._num_clears = 0
        self._lock = threading.Lock()  # of counts
        self._write_lock = threading.Lock()  # held while a file is written
        self._readers = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="mnemosyne-leaves")
        # a daemon: what is left of a process that does not close it is written no more
        self._writer = threading.Thread(
            target=self._write_all, name="mnemosyne-leaf-writer", daemon=True
        )
        self._writer.start()

    @property
    def local_bytes(self) -> int:
        """Bytes of this rank's part of a leaf."""
        layout, copies = self.folder.layout, self._copies
        return 2 * copies.layers.size * copies.heads.size * layout.piece_bytes

    @property
    def num_room(self) -> int:
        """Leaves that may be handed on now."""
        return (QUEUED_BYTES - self._queued_bytes) // self.local_bytes

    def save_all(self, plan: Plan) -> None:
        """Copy the leaves that a step hands on; before pages change hands."""
        for save in plan.saves:
            self.save(save)

    def follow(self, plan: Plan, sequences: Mapping[int, SequenceState]) -> dict[int, int]:
        """Read and restore what a step asks for; once its tables are known.

        Returns:
            By request, how many of its leaves were whole.
        """
        for request_id in plan.released:
            self.drop(request_id)
        for fetch in plan.fetches:
            sequence = sequences[fetch.request_id]
            self.fetch(fetch, sequence.tokens, sequence.table)
        return {
            restore.request_id: self.restore(restore, sequences[restore.request_id].table)
            for restore in plan.restores
        }

    def save(self, save: Save) -> None:
        """Copy this rank's part of a leaf; it is written later, or not if the disk is too slow."""
        leaf = Leaf(save.digest, save.before, save.start, save.ids)
        for source in save.sources:
            if source.group != self._group or not self._writes:
                continue
            if self.num_room < 1:
                self.folder.counts.leaves_skipped += 1
                continue
            pages = np.array(source.pages, dtype=np.int64)
            tokens = Span(source.first, source.stop)
            copied = self._copies.copy_out(pages, source.offset, tokens)
            self._put(_Write(leaf, *copied, self._num_clears))

    def note_used(self, digests: Sequence[bytes]) -> None:
        """Note that a chain was used, once what waits is written."""
        self._queue.put(list(digests))

    def clear(self) -> None:
        """Remove all files of the model, and write nothing of what waits."""
        with self._write_lock:
            self._num_clears += 1
            self.folder.clear()

    def fetch(self, fetch: Fetch, tokens: np.ndarray, table: PageTable) -> None:
        """Begin to read the leaves of a request.

        Args:
            fetch: the leaves.
            tokens: of the request, int64; what is read must be the same.
            table: where its keys will lie.
        """
        size = self.folder.layout.leaf_tokens
        leaves, before, start = list[Leaf](), fetch.before, fetch.start
        for digest in fetch.digests:
            ids = tokens[start : start + size].astype(ID_DTYPE).tobytes()
            leaves.append(Leaf(digest, before, start, ids))
            before, start = digest, start + size
        wanted = [self._wanted(leaf.start, table) for leaf in leaves]
        self._readings[fetch.request_id] = reading = _Reading(leaves, fetch.parts, wanted)
        self._read_on(reading)

    def num_ready(self, request_id: int, first: int) -> int:
        """Leaves of a request from ``first`` on that could be restored without a wait."""
        reading, count = self._readings.get(request_id), 0
        for read in list(reading.reads)[first - reading.taken :] if reading is not None else ():
            if not read.done():
                break
            count += 1
        return count

    def restore(self, restore: Restore, table: PageTable) -> int:
        """Write leaves that were read to their pages.

        Args:
            restore: which; those of a request come in order.
            table: where its keys lie.

        Returns:
            How many of them were whole: all before the first that was not.
        """
        reading = self._readings.get(restore.request_id)
        if reading is None or reading.taken != restore.first:
            return 0  # one before them was not whole
        for index in range(restore.first, restore.stop):
            if not reading.reads:
                return index - restore.first
            pieces = reading.reads.popleft().result()
            if pieces is None:
                self.drop(restore.request_id)
                return index - restore.first
            reading.taken += 1
            self._read_on(reading)
            self._copy_in(pieces, reading.leaves[index].start, restore.from_position, table)
        if reading.taken == len(reading.leaves):
            self.drop(restore.request_id)
        return restore.stop - restore.first

    def drop(self, request_id: int) -> None:
        """Read no more for a request."""
        reading = self._readings.pop(request_id, None)
        for read in reading.reads if reading is not None else ():
            read.cancel()

    def close(self) -> None:
        """Write what waits, as long as that takes no longer than ``CLOSE_S``."""
        for request_id in list(self._readings):
            self.drop(request_id)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._queue.put(None)
        self._writer.join(CLOSE_S)
        if self._writer.is_alive():
            log.warning("some leaves were not written within %.0f s", CLOSE_S)

    def _wanted(self, start: int, table: PageTable) -> Part | None:
        """The part of a leaf that this rank needs."""
        stop = start + self.folder.layout.leaf_tokens
        for index, extent in enumerate(table.extents):
            if extent.group == self._group:
                positions = table.positions(index, FAR)
                tokens = Span(positions.start, positions.stop).common(Span(start, stop))
                if tokens.size:
                    within = Span(tokens.first - start, tokens.stop - start)
                    return Part(self._copies.layers, self._copies.heads, within)
        return None

    def _copy_in(
        self, pieces: Sequence[Piece], start: int, from_position: int, table: PageTable
    ) -> None:
        stop = start + self.folder.layout.leaf_tokens
        for index, extent in enumerate(table.extents):
            if extent.group != self._group:
                continue
            positions = table.positions(index, FAR)
            tokens = Span(max(positions.start, from_position), positions.stop)
            tokens = tokens.common(Span(start, stop))
            if tokens.size:
                within = Span(tokens.first - start, tokens.stop - start)
                slot = tokens.first - extent.start
                self._copies.copy_in(pieces, extent.pages, slot, within)

    def _read_on(self, reading: _Reading) -> None:
        """Have as many leaves read as may wait for their place."""
        num_ahead = max(2, AHEAD_BYTES // self.local_bytes)
        while len(reading.reads) < num_ahead:
            index = reading.taken + len(reading.reads)
            if index == len(reading.leaves):
                return
            wanted = reading.wanted[index]
            if wanted is None:
                read: Read = Future()
                read.set_result([])
            else:
                leaf, parts = reading.leaves[index], reading.parts[index]
                read = self._readers.submit(self.folder.read, leaf, parts, wanted)
            reading.reads.append(read)

    def _put(self, write: _Write) -> None:
        with self._lock:
            self._queued_bytes += write.num_bytes
        self._queue.put(write)

    def _write_all(self) -> None:
        """Write until there is nothing more to come."""
        with suppress(OSError):  # the niceness of a thread is its own on Linux alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            try:
                work = self._queue.get(timeout=IDLE_S)
            except queue.Empty:
                self.folder.renew()
                continue
            if work is None:
                return
            if isinstance(work, list):
                self.folder.note_used(work)
                continue
            self._write(work)
            with self._lock:
                self._queued_bytes -= work.num_bytes
            self.folder.renew()  # others write as well, and all of it is bounded

    def _write(self, work: _Write) -> None:
        with self._write_lock:
            if work.num_clears == self._num_clears:
                what = work.leaf, work.part, work.pieces
                is_written = self.folder.write(*what, self._copies.pool.page_size)
                self.folder.counts.leaves_skipped += not is_written
