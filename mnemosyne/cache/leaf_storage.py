"""The few things that a folder of leaves asks of the file system; tests put faults in their way."""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

UNFINISHED = ".unfinished-"  # begins the names of files that are being written
SETTLED_S = 60.0  # after which an unfinished file without a lock counts as left over


class Entry(NamedTuple):
    """A file in a folder."""

    name: str
    num_bytes: int
    used_ns: int  # when it was last used, or written


class Storage:
    """Files of one folder, by name. Errors are those of the operating system.

    Args:
        folder: that is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self) -> list[Entry]:
        """All that is there now."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # others remove files as well
                    status = entry.stat(follow_symlinks=False)
                    found.append(Entry(entry.name, status.st_size, status.st_mtime_ns))
        return found

    def changed_ns(self) -> int:
        """The time at which a file last came or went."""
        return self.folder.stat().st_mtime_ns

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write a file that is whole or not there, also if others write it or power fails.

        The unfinished file is locked, so that others can tell it from one that was left over.
        """
        unfinished = f"{UNFINISHED}{os.getpid()}-{secrets.token_hex(8)}"
        descriptor = os.open(
            self.folder / unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in parts:
                self.append(descriptor, memoryview(part))
            self.sync(descriptor)
            self.rename(unfinished, name)
        except BaseException:
            with suppress(OSError):
                self.remove(unfinished)
            raise
        finally:
            os.close(descriptor)

    def append(self, descriptor: int, data: memoryview) -> None:
        """Write all of some bytes."""
        while data:
            data = data[os.write(descriptor, data) :]

    def sync(self, descriptor: int) -> None:
        """Wait until the written bytes are on the disk."""
        os.fdatasync(descriptor)

    def rename(self, name: str, other: str) -> None:
        """Give a file another name, in place of a file that has it."""
        os.replace(self.folder / name, self.folder / other)

    def remove(self, name: str) -> None:
        """Remove a file."""
        os.unlink(self.folder / name)

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open a file for reading; a pipe of that name does not block."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.folder / name, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def read_at(self, descriptor: int, offset: int, num_bytes: int) -> bytearray:
        """Bytes of a file; fewer if it ends before. It is not mapped: others may cut it short."""
        data = bytearray(num_bytes)
        view, done = memoryview(data), 0
        while done < num_bytes:
            count = os.preadv(descriptor, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        view.release()
        del data[done:]
        return data

    def note_used(self, name: str, used_ns: int) -> None:
        """Note when a file was used, for all processes."""
        os.utime(self.folder / name, ns=(used_ns, used_ns))

    @contextmanager
    def locked(self, name: str) -> Iterator[bool]:
        """Hold a lock that ends with this process; whether it was free."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.folder / name, flags, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def is_left_over(self, entry: Entry, now_ns: int) -> bool:
        """Return whether the writer of an unfinished file is gone."""
        if now_ns - entry.used_ns < SETTLED_S * 1e9:
            return False
        with self.locked(entry.name) as is_free:
            return is_free
