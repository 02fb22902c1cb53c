"""The link between the front and rank 0: whole messages over a stream socket of this host.

A front that starts the ranks gives rank 0 one end of a socket pair, which has no name. Ranks that
others start find the front by an abstract Unix socket; each end asks the kernel of which user the
other is.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys

from mnemosyne.parallel.keys import user_of

MAX_BYTES = 1 << 28  # of one message: a prompt of 64M tokens
BUFFER_BYTES = 1 << 20  # that wait in a process before its senders have to wait
HEADER = struct.Struct("<I")
INHERITED = "fd:"  # a link that is a descriptor, not a name
BACKLOG = 8


class Link:
    """Whole messages over a connected socket, each at most ``MAX_BYTES`` long.

    Args:
        reader: of the socket.
        writer: of the same.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, connected: socket.socket) -> Link:
        """A link over a connected socket, which it closes in the end."""
        reader, writer = await asyncio.open_connection(sock=connected, limit=BUFFER_BYTES)
        writer.transport.set_write_buffer_limits(high=BUFFER_BYTES)
        return cls(reader, writer)

    async def receive(self) -> bytes | None:
        """The next message; None once the other end is gone.

        Raises:
            ValueError: if what comes is no message of ours.
        """
        try:
            (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if size > MAX_BYTES:
                raise ValueError(f"a message must have at most {MAX_BYTES} bytes, got {size}")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            return None

    def put(self, data: bytes) -> None:
        """Send a message, without waiting for room; ``flush`` waits."""
        self._writer.write(frame(data))

    async def flush(self) -> bool:
        """Wait until the other end has taken most of it; whether it is still there."""
        try:
            await self._writer.drain()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Send waiting messages, if the other end takes them, and hang up."""
        self._writer.close()

    def abort(self) -> None:
        """Hang up now."""
        self._writer.transport.abort()


def frame(data: bytes) -> bytes:
    """A message as it travels.

    Raises:
        ValueError: if it is too long.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(
            f"a job and what comes of it must fit {MAX_BYTES} bytes, got {len(data)}; send a "
            "shorter prompt or ask for fewer log-probabilities"
        )
    return HEADER.pack(len(data)) + data


def inherited(number: int) -> socket.socket:
    """The end of a socket pair that this process's parent has passed on.

    Raises:
        ValueError: if there is none.
    """
    try:
        found = socket.socket(fileno=number)
        os.set_inheritable(number, False)  # children of this process must not hold it open
    except OSError as error:
        raise ValueError(
            f"serve.link must name a socket that this process was given, got fd:{number} "
            f"({error.strerror}); drop it"
        ) from error
    return found


def listen(name: str) -> socket.socket:
    """A socket that ranks find by ``name`` on this host; it leaves nothing in any folder.

    Raises:
        ValueError: if the name is taken, or this is no Linux.
    """
    address, listener = _address(name), _named_socket(name)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(
            f"serve.link must be a name that no other server has, got {name!r} "
            f"({error.strerror}); choose another one, or end that server"
        ) from error
    listener.listen(BACKLOG)
    return listener


def connect(name: str) -> socket.socket | None:
    """A connection to the front that has a name; None if there is none now.

    Raises:
        ValueError: if whoever has it is another user.
    """
    address, connection = _address(name), _named_socket(name)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    if user_of(connection) != os.geteuid():
        connection.close()
        raise ValueError(f"serve.link must be the name of a front of yours, got {name!r}")
    return connection


def _named_socket(name: str) -> socket.socket:
    if sys.platform != "linux":
        raise ValueError(
            f"serve.link must be left out where the system is no Linux, got {name!r}; let the "
            "front start the ranks"
        )
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _address(name: str) -> str:
    address = f"\0mnemosyne-link-{name}"
    if not name or len(address) > 100 or not name.isascii():
        raise ValueError(f"serve.link must be a short name, got {name!r}; write serve.link=main")
    return address
