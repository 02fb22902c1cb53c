"""One connection between rank 0 and each other rank, apart from all others, to notice who is gone.

The kernel closes the connections of a process that dies, and asks silent hosts whether they are
still there: neither needs the process at the other end to have time for it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import msgspec
from msgspec import Struct

from mnemosyne.parallel.address import Address, Store, announce, find, listening_interface
from mnemosyne.parallel.trouble import Trouble
from mnemosyne.parallel.whereabouts import Whereabouts

SERVICE = "links"
HELLO_S = 5.0  # a stranger that says nothing holds up the others no longer
MAX_BYTES = 1 << 16
CONNECTION_CLOSED = "its connection was closed"
HOST_SILENT = "its host does not answer"
# A host that does not answer is given up after 2 + 3 x 1 seconds.
KEEP_ALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}


class Hello(Struct, array_like=True, tag="hello"):
    """The first words of a rank."""

    secret: str
    rank: int
    label: str


class Ask(Struct, array_like=True, tag="ask"):
    """Rank 0 wants to know where everyone is."""


class Answer(Struct, array_like=True, tag="answer"):
    """Where a rank is."""

    where: Whereabouts


class Left(Struct, array_like=True, tag="left"):
    """A rank ends properly; ``error`` says why if it had to."""

    error: str = ""


class Verdict(Struct, array_like=True, tag="verdict"):
    """Rank 0 says what happened; everyone ends."""

    text: str


Word = Hello | Ask | Answer | Left | Verdict | Trouble

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


class Links:
    """Connections of this rank: rank 0 has one to every other rank, the others one to rank 0.

    Args:
        peers: connection by rank.
        labels: of all ranks that this one knows of.
    """

    def __init__(self, peers: dict[int, Connection], labels: dict[int, str]) -> None:
        self._peers = peers
        self.labels = labels

    @property
    def peers(self) -> tuple[int, ...]:
        """Ranks at the other ends."""
        return tuple(self._peers)

    def send(self, word: Word) -> None:
        """Tell every peer; one that is gone is found out when it is read from."""
        data = _ENCODER.encode(word)
        for connection in self._peers.values():
            try:
                connection.send_bytes(data)
            except OSError:
                continue

    def receive(self, others: Sequence[Any], timeout_s: float) -> Iterable[tuple[int, Word | str]]:
        """What peers say.

        Args:
            others: files to wait for as well.
            timeout_s: how long to wait if nothing comes.

        Yields:
            Rank and word; or rank and the reason why nothing more will come from it.
        """
        ready = wait([*others, *self._peers.values()], timeout_s)
        for rank, connection in list(self._peers.items()):
            if connection not in ready:
                continue
            try:
                yield rank, _DECODER.decode(connection.recv_bytes(MAX_BYTES))
            except (EOFError, OSError, msgspec.MsgspecError) as error:
                connection.close()
                del self._peers[rank]
                is_silent = isinstance(error, TimeoutError)
                yield rank, HOST_SILENT if is_silent else CONNECTION_CLOSED

    def close(self) -> None:
        for connection in self._peers.values():
            connection.close()
        self._peers.clear()


def open_links(store: Store, *, rank: int, world_size: int, label: str, timeout_s: float) -> Links:
    """Connect this rank; every rank calls it at once.

    Args:
        store: shared by all ranks.
        rank: this one.
        world_size: how many there are.
        label: what this one is called.
        timeout_s: how long to wait for the others.

    Raises:
        RuntimeError: naming the ranks that did not come.
    """
    if rank == 0:
        return _accept(store, world_size, label, timeout_s)
    address = find(store, SERVICE, rank)
    try:
        opened = socket.create_connection((address.host, address.port), timeout=timeout_s)
    except OSError as error:
        raise RuntimeError(f"rank 0 cannot be reached at {address.host}: {error}") from error
    connection = _connection(opened)
    connection.send_bytes(_ENCODER.encode(Hello(address.secret, rank, label)))
    return Links({0: connection}, {0: "the driver", rank: label})


def _accept(store: Store, world_size: int, label: str, timeout_s: float) -> Links:
    interface = listening_interface()
    links = Links({}, {0: label})
    missing = set(range(1, world_size))
    deadline_s = time.monotonic() + timeout_s
    with socket.create_server((interface.bind, 0), backlog=world_size) as server:
        address = announce(store, SERVICE, interface.public, server.getsockname()[1])
        while missing:
            server.settimeout(max(0.001, deadline_s - time.monotonic()))
            try:
                opened, _ = server.accept()
            except TimeoutError:
                links.close()
                ranks = ", ".join(map(str, sorted(missing)))
                raise RuntimeError(
                    f"ranks {ranks} did not connect within {timeout_s:.0f} s"
                ) from None
            connection = _connection(opened)
            hello = _hello(connection, address, missing)
            if hello is None:
                connection.close()
                continue
            missing.remove(hello.rank)
            links._peers[hello.rank] = connection
            links.labels[hello.rank] = hello.label
    return links


def _hello(connection: Connection, address: Address, missing: set[int]) -> Hello | None:
    """The rank at the other end, or None if it is none of ours."""
    try:
        if not connection.poll(HELLO_S):
            return None
        hello = _DECODER.decode(connection.recv_bytes(MAX_BYTES))
    except (EOFError, OSError, msgspec.MsgspecError):
        return None
    if isinstance(hello, Hello) and hello.secret == address.secret and hello.rank in missing:
        return hello
    return None


def _connection(opened: socket.socket) -> Connection:
    """Framed messages over a socket that notices a silent host."""
    opened.settimeout(None)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(opened.detach())
