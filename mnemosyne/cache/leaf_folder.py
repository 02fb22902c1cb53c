"""The leaves in a folder that processes share: which are whole, which go first, which are refused.

Every file is found by its name, so nothing is read to know what is there. A file that is not what
its name says is removed when it is read, and its tokens are computed and written again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

from mnemosyne.cache.leaf_file import (
    DamagedLeaf,
    Layout,
    Leaf,
    Part,
    Piece,
    Span,
    encode,
    file_name,
    parse_name,
    read,
)
from mnemosyne.cache.leaf_storage import UNFINISHED, Entry, Storage

log = logging.getLogger(__name__)

LOCK = ".lock"
KEPT_SHARE = 0.9  # of the bytes that a folder may hold, once some of them had to go
PAUSE_S = 30.0  # without writing, after the disk refused to
RENEWED_S = 10.0  # after which the names are read again, if there are others


@dataclass(slots=True)
class LeafCounts:
    """Counts of what a process has done with a folder."""

    tokens_restored: int = 0
    bytes_written: int = 0
    bytes_read: int = 0
    files_refused: int = 0
    leaves_skipped: int = 0  # not written, because the disk was too slow, or full


class LeafFolder:
    """Files of leaves by digest.

    Any thread may use it. The names of files are kept in memory; those that other processes write
    or remove meanwhile are seen after ``renew``.

    Args:
        storage: of the folder.
        layout: of the model; files of others are left alone, but count.
        max_bytes: that all files together may hold.
    """

    def __init__(self, storage: Storage, layout: Layout, max_bytes: int) -> None:
        self.layout = layout
        self.counts = LeafCounts()
        self._storage = storage
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._leaves: dict[bytes, tuple[Part, ...]] = {}  # of this model
        self._whole: set[bytes] = set()
        self._doubted: set[bytes] = set()  # digests whose files do not count, if there are any
        self._total_bytes = self._num_foreign = 0
        self._renewed_s = self._paused_s = 0.0
        self._seen_ns = -1
        self._remove_left_overs()
        self.renew()

    def __len__(self) -> int:
        return len(self._whole)

    def has(self, digest: bytes) -> bool:
        """Return whether all of a leaf is there."""
        return digest in self._whole

    def parts(self, digest: bytes) -> tuple[str, ...]:
        """Names of the parts of a leaf that are there."""
        return tuple(str(part) for part in self._leaves.get(digest, ()))

    def renew(self) -> None:
        """Read the names again, if files came or went and it was not done a moment ago."""
        now_s = time.monotonic()
        if self._seen_ns >= 0 and now_s - self._renewed_s < RENEWED_S:
            return
        self._renewed_s = now_s
        try:
            changed_ns = self._storage.changed_ns()
            if changed_ns != self._seen_ns:
                self._take_in(self._storage.entries())
                self._seen_ns = changed_ns
        except OSError as error:
            self._complain("cannot be read", error)

    def write(self, leaf: Leaf, part: Part, pieces: Sequence[memoryview], page_size: int) -> bool:
        """Write a part of a leaf, in place of what is there.

        Args:
            leaf: whose part it is.
            part: what ``pieces`` are.
            pieces: see ``encode``.
            page_size: of the cache that they come from.

        Returns:
            Whether it is there now.
        """
        name = file_name(self.layout, leaf.digest, part)
        if time.monotonic() < self._paused_s:
            return False
        try:
            data = encode(self.layout, leaf, part, pieces, page_size)
            num_bytes = sum(len(each) for each in data)
            if not self._make_room(num_bytes):
                return False
            self._storage.write(name, data)
        except OSError as error:
            self._paused_s = time.monotonic() + PAUSE_S
            self._complain("cannot be written", error)
            return False
        self.counts.bytes_written += num_bytes
        with self._lock:
            self._total_bytes += num_bytes
            self._doubted.discard(leaf.digest)
            self._enter(leaf.digest, part)
        return True

    def read(self, leaf: Leaf, names: Iterable[str], wanted: Part) -> list[Piece] | None:
        """Verified pieces of a leaf.

        Args:
            leaf: that was found.
            names: of its parts.
            wanted: layers, heads and tokens.

        Returns:
            Pieces that together hold all that is wanted; None if a file is gone or damaged, or
            they would not.
        """
        named = (Part.parse(name) for name in names)
        parts = [part for part in named if part is not None and _meet(part, wanted)]
        # files may have come and gone between a look at the leaf and one at its parts
        if not hold_all(parts, wanted):
            self.forget(leaf.digest)
            return None
        found: list[Piece] = []
        for part in parts:
            pieces = self._read_file(leaf, part, wanted)
            if pieces is None:
                self.forget(leaf.digest)
                return None
            found += pieces
        return found

    def forget(self, digest: bytes) -> None:
        """Have the files of a leaf count no more, until it is written again."""
        with self._lock:
            self._doubted.add(digest)
            self._leaves.pop(digest, None)
            self._whole.discard(digest)

    def expect(self, digest: bytes) -> None:
        """Have the files of a leaf count that ranks write from now on."""
        with self._lock:
            self._doubted.discard(digest)

    def note_used(self, digests: Sequence[bytes]) -> None:
        """Note that a chain was used, for all processes; its end goes before its beginning."""
        now_ns = time.time_ns()
        for index, digest in enumerate(digests):
            for part in self._leaves.get(digest, ()):
                with suppress(OSError):  # it may be gone
                    name = file_name(self.layout, digest, part)
                    self._storage.note_used(name, now_ns - index * 1000)

    def clear(self) -> None:
        """Remove all files of this model."""
        with suppress(OSError):
            for entry in self._storage.entries():
                named = parse_name(entry.name)
                if named is not None and named[0] == self.layout.model[:16]:
                    self._remove(entry)
        with self._lock:
            self._leaves.clear()
            self._whole.clear()

    def describe(self) -> str:
        """One line: how much is there."""
        others = len(self._leaves) - len(self._whole)
        parts = [f"{len(self) * self.layout.leaf_tokens:,} tokens of this model"]
        parts += [f"{others:,} leaves that are not whole"] if others else []
        parts += [f"{self._num_foreign:,} files of others"] if self._num_foreign else []
        size = f"{self._total_bytes / 2**20:,.1f} of {self._max_bytes / 2**20:,.1f} MiB"
        return f"{self._storage.folder} holds {', '.join(parts)}; {size} in all"

    def _read_file(self, leaf: Leaf, part: Part, wanted: Part) -> list[Piece] | None:
        name, pieces = file_name(self.layout, leaf.digest, part), list[Piece]()
        try:
            with self._storage.opened(name) as descriptor:
                read_at = partial(self._storage.read_at, descriptor)
                for found in read(read_at, self.layout, leaf, part, wanted):
                    pieces += found
        except FileNotFoundError:
            log.info("%s is gone; its tokens are computed", name)
            return None
        except (DamagedLeaf, OSError) as error:
            self.counts.files_refused += 1
            log.warning("%s is refused and removed: %s; its tokens are computed", name, error)
            with suppress(OSError):
                self._storage.remove(name)
            return None
        self.counts.bytes_read += sum(len(piece.data) for piece in pieces)
        return pieces

    def _make_room(self, num_bytes: int) -> bool:
        """Remove the files that were used longest ago, if there are too many bytes."""
        if self._total_bytes + num_bytes <= self._max_bytes:
            return True
        with self._storage.locked(LOCK) as is_free:
            if not is_free:
                return False  # another process is at it
            entries = self._storage.entries()
            room = max(0, int(KEPT_SHARE * self._max_bytes) - num_bytes)
            left = sum(entry.num_bytes for entry in entries)
            for entry in sorted(entries, key=lambda entry: entry.used_ns):
                if left <= room:
                    break
                if parse_name(entry.name) is not None:
                    self._remove(entry)
                    left -= entry.num_bytes
            self._take_in(self._storage.entries())
        return self._total_bytes + num_bytes <= self._max_bytes

    def _take_in(self, entries: Iterable[Entry]) -> None:
        leaves: dict[bytes, list[Part]] = {}
        total_bytes = num_foreign = 0
        for entry in entries:
            total_bytes += entry.num_bytes
            named = parse_name(entry.name)
            if named is None or named[1] in self._doubted:
                continue
            if named[0] != self.layout.model[:16]:
                num_foreign += 1
            else:
                leaves.setdefault(named[1], []).append(named[2])
        with self._lock:
            self._total_bytes, self._num_foreign = total_bytes, num_foreign
            self._leaves.clear()
            self._whole.clear()
            for digest, parts in leaves.items():
                self._leaves[digest] = tuple(sorted(parts))
                if is_whole(self.layout, parts):
                    self._whole.add(digest)

    def _enter(self, digest: bytes, part: Part) -> None:
        parts = tuple(sorted({*self._leaves.get(digest, ()), part}))
        self._leaves[digest] = parts
        if is_whole(self.layout, parts):
            self._whole.add(digest)

    def _remove(self, entry: Entry) -> None:
        with suppress(FileNotFoundError):
            self._storage.remove(entry.name)

    def _remove_left_overs(self) -> None:
        now_ns = time.time_ns()
        with suppress(OSError):
            for entry in self._storage.entries():
                if entry.name.startswith(UNFINISHED) and self._storage.is_left_over(entry, now_ns):
                    self._remove(entry)

    def _complain(self, what: str, error: OSError) -> None:
        log.warning(
            "cache.dir %s %s (%s); prefixes are computed, and it is tried again in %.0f s",
            *(self._storage.folder, what, error.strerror, PAUSE_S),
        )


def is_whole(layout: Layout, parts: Sequence[Part]) -> bool:
    """Return whether parts hold all layers, heads and tokens of a leaf; they may overlap."""
    sizes = layout.num_layers, layout.num_heads, layout.leaf_tokens
    return hold_all(parts, Part(*(Span(0, size) for size in sizes)))


def hold_all(parts: Sequence[Part], wanted: Part) -> bool:
    """Return whether parts together hold all of another one; they may overlap."""
    if len(parts) == 1:
        return _covers(parts[0], wanted)
    axes = []
    for axis, span in enumerate(wanted):
        ends = {end for part in parts for end in part[axis] if span.first < end < span.stop}
        axes.append(list(pairwise(sorted({*span, *ends}))))
    return all(any(_covers(part, cell) for part in parts) for cell in product(*axes))


def _meet(part: Part, other: Part) -> bool:
    return all(a.common(b).size > 0 for a, b in zip(part, other, strict=True))


def _covers(part: Part, cell: Iterable[tuple[int, int]]) -> bool:
    spans = zip(part, cell, strict=True)
    return all(span.first <= first and stop <= span.stop for span, (first, stop) in spans)
