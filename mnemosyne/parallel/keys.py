"""The key of a mesh, which tells its ranks from strangers; it never travels in the open."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b

from mnemosyne.parallel.address import is_loopback, is_on_one_host

KEY_BYTES = 32
MAX_FILE_BYTES = 4096
MAKE_ONE = "make one with: (umask 077; head -c 32 /dev/urandom > mesh.key)"
BACKLOG = 128
TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class MeshKey:
    """A secret shared by the ranks of a mesh."""

    secret: bytes = field(repr=False)

    def derive(self, purpose: str) -> bytes:
        """32 bytes for one purpose; they tell nothing of the key or of those for another."""
        return blake2b(purpose.encode(), key=self.secret, digest_size=KEY_BYTES).digest()


def read_key(path: str) -> MeshKey:
    """The key in a file that every host of the mesh has a copy of.

    Args:
        path: a file of at least 32 bytes, which only its owner may read.

    Raises:
        ValueError: if it cannot be read, or others can read it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"mesh.key must be a readable file, got {path!r} ({reason}); {MAKE_ONE}"
        ) from error
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"mesh.key must be a regular file, got {path!r}; {MAKE_ONE}")
        if found.st_uid not in (os.geteuid(), 0) or found.st_mode & 0o077:
            raise ValueError(
                f"mesh.key must be a file of yours that nobody else can read, got {path!r} of user "
                f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}; run chmod 600 on it"
            )
        content = os.read(descriptor, MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if not KEY_BYTES <= len(content) <= MAX_FILE_BYTES:
        size = len(content) if len(content) <= MAX_FILE_BYTES else f"more than {MAX_FILE_BYTES}"
        raise ValueError(
            f"mesh.key must be a file of {KEY_BYTES} to {MAX_FILE_BYTES} bytes, got {path!r} of "
            f"{size}; {MAKE_ONE}"
        )
    return MeshKey(blake2b(content, digest_size=KEY_BYTES).digest())


def mesh_key(path: str | None) -> MeshKey | None:
    """The key in the file that the config names; None where ranks share a host and need no file.

    Raises:
        ValueError: if the file cannot be used, or ranks on several hosts have none.
    """
    if path is not None:
        return read_key(path)
    if not is_on_one_host():
        raise _no_file()
    return None


@contextmanager
def offered_key(key: MeshKey | None, host: str) -> Iterator[tuple[MeshKey, str]]:
    """The key of rank 0, and where the others get it while the body runs.

    Args:
        key: from a file that all ranks read; None: a new one, for ranks of one host and one user.
        host: where rank 0 listens.

    Yields:
        The key, and the name of an abstract Unix socket, "" if all have read the file. The kernel
        tells of which user a process at its other end is, and it leaves nothing in a folder.

    Raises:
        ValueError: if ranks on several hosts have no file.
    """
    if key is not None:
        yield key, ""
        return
    if not is_loopback(host) or sys.platform != "linux":
        raise _no_file()
    key, name = MeshKey(secrets.token_bytes(KEY_BYTES)), f"mnemosyne-{secrets.token_hex(16)}"
    is_over = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as desk:
        desk.bind(f"\0{name}")
        desk.listen(BACKLOG)
        desk.settimeout(TICK_S)
        thread = threading.Thread(target=_hand_out, args=(desk, key, is_over), daemon=True)
        thread.start()
        try:
            yield key, name
        finally:
            is_over.set()
            thread.join()


def take_key(key: MeshKey | None, name: str, timeout_s: float) -> MeshKey:
    """The key that ``offered_key`` has for the other ranks.

    Args:
        key: from the file; None if there is none.
        name: as the store tells it: it is not trusted, so the user at the other end is checked.
        timeout_s: how long to wait for rank 0.

    Raises:
        ValueError: if rank 0 has a file and this rank has none, or the other way round.
        RuntimeError: if the process at the other end is not of this user, or not there.
    """
    if bool(name) == (key is not None):
        raise ValueError(
            "mesh.key must be given to every rank or to none, got it on "
            f"{'this rank' if key is not None else 'rank 0'} alone; pass the same words to all"
        )
    if key is not None:
        return key
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as desk:
        desk.settimeout(timeout_s)
        try:
            desk.connect(f"\0{name}")
            is_ours = user_of(desk) == os.geteuid()
            secret = desk.recv(KEY_BYTES, socket.MSG_WAITALL) if is_ours else b""
        except OSError as error:
            raise RuntimeError(f"rank 0 cannot be asked for the mesh's key: {error}") from error
    if len(secret) != KEY_BYTES:
        raise RuntimeError("rank 0 cannot be asked for the mesh's key: it is of another user")
    return MeshKey(secret)


def _no_file() -> ValueError:
    return ValueError(
        "mesh.key must name a file with the key of the mesh where ranks run on several hosts "
        f"(or not on Linux), got none; {MAKE_ONE}, and copy it to each host"
    )


def _hand_out(desk: socket.socket, key: MeshKey, is_over: threading.Event) -> None:
    """Give the key to processes of this user; nothing that others do is waited for."""
    while not is_over.is_set():
        try:
            asker, _ = desk.accept()
        except OSError:  # nobody came, or no descriptor is free
            is_over.wait(TICK_S / 100)
            continue
        with asker:
            try:
                if user_of(asker) == os.geteuid():
                    asker.send(key.secret)  # fits in the buffer of any socket
            except OSError:
                continue


def user_of(peer: socket.socket) -> int:
    """The user of the process at the other end of a Unix socket, as the kernel has it."""
    size = struct.calcsize("3i")
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)
