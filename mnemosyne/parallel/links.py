"""One connection between rank 0 and each other rank, apart from all others, to notice lost ranks.

The kernel closes the connections of a process that dies, and asks silent hosts whether they are
still there: neither needs the process at the other end to have time for it.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

import msgspec
from msgspec import Struct

from mnemosyne.parallel.address import Address, Store, announce, find, listening_host
from mnemosyne.parallel.handshake import HandshakeError, Sealed, greet, introduce
from mnemosyne.parallel.keys import MeshKey, offered_key, take_key
from mnemosyne.parallel.trouble import Trouble
from mnemosyne.parallel.whereabouts import Whereabouts

SERVICE = "links"
HELLO_S = 5.0  # a stranger that says nothing keeps a connection no longer
MAX_GREETED = 64  # at a time; the one that has kept us waiting longest makes room for the next
BACKLOG = 512
RETRY_S = 0.1
MAX_BYTES = 1 << 16
CONNECTION_CLOSED = "its connection was closed"
HOST_SILENT = "its host does not answer"
# A host that does not answer is given up after 2 + 3 x 1 seconds.
KEEP_ALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}

Arrival = tuple[int, str, Sealed]  # rank, label, connection


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


Word = Ask | Answer | Left | Verdict | Trouble

_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Word] = msgspec.msgpack.Decoder(Word)


class Links:
    """Connections of this rank: rank 0 has one to every other rank, the others one to rank 0.

    Args:
        peers: connection by rank.
        labels: of all ranks that this one knows of.
    """

    def __init__(self, peers: dict[int, Sealed], labels: dict[int, str]) -> None:
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
        """The messages of peers.

        Args:
            others: files to wait for as well.
            timeout_s: how long to wait if nothing comes.

        Yields:
            Rank and word; or rank and the reason why nothing more will come from it.
        """
        watched: list[Any] = [*others, *self._peers.values()]
        ready: list[Any] = wait(watched, timeout_s)
        for rank, connection in list(self._peers.items()):
            if connection not in ready:
                continue
            try:
                yield rank, _DECODER.decode(connection.recv_bytes(MAX_BYTES))
            except (EOFError, OSError, HandshakeError, msgspec.MsgspecError) as error:
                connection.close()
                del self._peers[rank]
                is_silent = isinstance(error, TimeoutError)
                yield rank, HOST_SILENT if is_silent else CONNECTION_CLOSED

    def close(self) -> None:
        for connection in self._peers.values():
            connection.close()
        self._peers.clear()


def open_links(
    store: Store,
    *,
    rank: int,
    world_size: int,
    label: str,
    timeout_s: float,
    key: MeshKey | None = None,
) -> Links:
    """Connect this rank; every rank calls it at once.

    Args:
        store: shared by all ranks.
        rank: this one.
        world_size: how many there are.
        label: what this one is called.
        timeout_s: how long to wait for the others.
        key: of the mesh, from a file; None: a new one, for ranks of one host.

    Raises:
        RuntimeError: naming the ranks that did not come.
    """
    if rank == 0:
        return _accept(store, world_size, label, key, timeout_s)
    address = find(store, SERVICE, rank)
    shared = take_key(key, address.desk, timeout_s)
    sealed = _connect(address, shared, rank, label, timeout_s)
    return Links({0: sealed}, {0: "the driver", rank: label})


def _connect(address: Address, key: MeshKey, rank: int, label: str, timeout_s: float) -> Sealed:
    """A connection to rank 0, again and again: where strangers crowd in, one may be dropped."""
    until_s = time.monotonic() + timeout_s
    while True:
        left_s = max(0.001, until_s - time.monotonic())
        try:
            opened = socket.create_connection((address.host, address.port), timeout=left_s)
            with opened:
                _notice_silence(opened)
                sealed = introduce(opened, key, rank, label, until_s)
            watched: list[Any] = [sealed]
            if wait(watched, max(0.0, until_s - time.monotonic())):
                sealed.recv_bytes(0)  # a welcome: from here on nobody cuts this connection off
                return sealed
            raise TimeoutError("rank 0 is too slow")
        except (OSError, EOFError) as error:
            if time.monotonic() + RETRY_S > until_s:
                where = f"{address.host}: {error}"
                raise RuntimeError(f"rank 0 cannot be reached at {where}") from error
            time.sleep(RETRY_S)


def _accept(
    store: Store, world_size: int, label: str, key: MeshKey | None, timeout_s: float
) -> Links:
    """Wait for all ranks; the port is closed once they are there."""
    links = Links({}, {0: label})
    missing = set(range(1, world_size))
    until_s = time.monotonic() + timeout_s
    host = listening_host()
    with offered_key(key, host) as (shared, desk), _Door(host, shared) as door:
        announce(store, SERVICE, Address(host, door.port, desk))
        while missing:
            try:
                arrival = door.arrivals.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                links.close()
                ranks = ", ".join(map(str, sorted(missing)))
                text = f"ranks {ranks} did not connect within {timeout_s:.0f} s"
                raise RuntimeError(text) from None
            rank, its_label, sealed = arrival
            if rank not in range(1, world_size):
                sealed.close()
                continue
            if rank not in missing:  # it was cut off and came again
                links._peers[rank].close()
            missing.discard(rank)
            links._peers[rank], links.labels[rank] = sealed, its_label
    return links


class _Door:
    """Where ranks arrive. Strangers are greeted as well, none of them while another waits.

    Args:
        host: to listen on.
        key: of the mesh.
    """

    def __init__(self, host: str, key: MeshKey) -> None:
        self.arrivals: queue.Queue[Arrival] = queue.Queue()
        self._key = key
        self._greeted: dict[socket.socket, None] = {}  # oldest first
        self._lock = threading.Lock()
        self._is_closed = False
        self._server = socket.create_server((host, 0), backlog=BACKLOG)
        self._server.settimeout(0.1)  # how long closing may take
        self.port = int(self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __enter__(self) -> _Door:
        return self

    def __exit__(self, *ignored: object) -> None:
        self._is_closed = True
        self._thread.join()
        self._server.close()
        self._make_room(0)

    def _listen(self) -> None:
        while not self._is_closed:
            try:
                opened, _ = self._server.accept()
            except OSError as error:  # nobody came; or, of all that may be, no descriptor is free
                if not isinstance(error, TimeoutError):
                    self._make_room(MAX_GREETED // 2)
                    time.sleep(RETRY_S)
                continue
            self._make_room(MAX_GREETED - 1)
            with self._lock:
                self._greeted[opened] = None
            threading.Thread(target=self._greet, args=(opened,), daemon=True).start()

    def _make_room(self, num_left: int) -> None:
        """Cut off the oldest connection that has not proved its rank yet."""
        with self._lock:
            while len(self._greeted) > num_left:
                oldest = next(iter(self._greeted))
                del self._greeted[oldest]
                with suppress(OSError):  # it may be gone
                    oldest.shutdown(socket.SHUT_RDWR)

    def _greet(self, opened: socket.socket) -> None:
        with opened:
            try:
                _notice_silence(opened)
                arrival = greet(opened, self._key, time.monotonic() + HELLO_S)
            except (OSError, HandshakeError):
                self._forget(opened)
                return
            if self._forget(opened):
                with suppress(OSError):  # a rank that is gone by now comes again
                    arrival[2].send_bytes(b"")
                    self.arrivals.put(arrival)

    def _forget(self, opened: socket.socket) -> bool:
        """Return whether a connection was not cut off; from here on it is not."""
        with self._lock:
            return opened in self._greeted and self._greeted.pop(opened) is None


def _notice_silence(opened: socket.socket) -> None:
    """Have the kernel ask a silent host whether it is still there."""
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
