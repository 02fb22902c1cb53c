"""Ranks find each other whatever strangers do at the port, and no word but a rank's is heard."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import Pipe
from unittest.mock import patch

import pytest
from torch.distributed import HashStore

from mnemosyne.parallel import links
from mnemosyne.parallel.address import Address, find
from mnemosyne.parallel.handshake import HandshakeError, Sealed, greet, introduce
from mnemosyne.parallel.keys import MeshKey
from mnemosyne.parallel.links import MAX_GREETED, Ask, Links, open_links

KEY = MeshKey(b"k" * 32)


def open_all(store: HashStore, world_size: int, timeout_s: float = 30) -> list[Links]:
    def open_one(rank: int) -> Links:
        return open_links(
            store, rank=rank, world_size=world_size, label=f"tp{rank}", timeout_s=timeout_s, key=KEY
        )

    with ThreadPoolExecutor() as threads:
        return list(threads.map(open_one, range(world_size)))


@contextmanager
def closing(opened: list[Links]) -> Iterator[list[Links]]:
    yield opened
    for each in opened:
        each.close()


def words_of(opened: Links) -> list[tuple[int, object]]:
    return list(opened.receive([], 5.0))


def test_ranks_are_known_by_number_and_label() -> None:
    with closing(open_all(HashStore(), 3)) as (driver, first, second):
        assert driver.labels == {0: "tp0", 1: "tp1", 2: "tp2"}
        driver.send(Ask())

        assert words_of(first) == words_of(second) == [(0, Ask())]


@pytest.mark.parametrize("num_strangers", [8, 3 * MAX_GREETED])
def test_strangers_at_the_port_hold_no_rank_up(num_strangers: int) -> None:
    store, noise = HashStore(), random.Random(0)
    said = [b"", b"x", noise.randbytes(35), noise.randbytes(36), noise.randbytes(5000)]
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        opening = threads.submit(
            open_links, store, rank=0, world_size=2, label="tp0", timeout_s=60, key=KEY
        )
        port = find(store, "links", rank=7).port
        for index in range(num_strangers):  # they stay, and say no more
            opened = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            with suppress(OSError):
                opened.sendall(said[index % len(said)])
        other = open_links(store, rank=1, world_size=2, label="tp1", timeout_s=60, key=KEY)
        with closing([opening.result(), other]) as (driver, follower):
            follower.send(Ask())

            assert words_of(driver) == [(1, Ask())]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_a_rank_that_does_not_connect_is_named() -> None:
    with ThreadPoolExecutor() as threads:
        store = HashStore()
        opening = threads.submit(
            open_links, store, rank=0, world_size=4, label="tp0", timeout_s=1, key=KEY
        )
        other = open_links(store, rank=2, world_size=4, label="tp2", timeout_s=1, key=KEY)

        with pytest.raises(RuntimeError, match="ranks 1, 3 did not connect within 1 s"):
            opening.result()
    other.close()


def test_a_rank_that_was_cut_off_comes_again() -> None:
    real, tries = introduce, []

    def cut_off(opened: socket.socket, *rest: object) -> Sealed:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionResetError
        return real(opened, *rest)

    with patch.object(links, "introduce", cut_off), closing(open_all(HashStore(), 2)) as opened:
        assert opened[0].peers == (1,)
    assert len(tries) == 2


def test_who_listens_without_the_key_is_not_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        impostor = threads.submit(answer_with_another_key, server)
        address = Address("127.0.0.1", server.getsockname()[1])

        with pytest.raises(HandshakeError, match="does not have the mesh's key"):
            links._connect(address, KEY, 1, "tp1", 10)
        impostor.result()


def answer_with_another_key(server: socket.socket) -> None:
    opened, _ = server.accept()
    with opened, suppress(OSError, HandshakeError):
        greet(opened, MeshKey(b"o" * 32), time.monotonic() + 5)


def test_a_handshake_that_somebody_has_heard_is_no_use_again() -> None:
    heard: list[bytes] = []
    client, server = socket.socketpair()
    thread = threading.Thread(target=introduce, args=(Tapped(client, heard), KEY, 1, "tp1", far()))
    thread.start()
    assert greet(server, KEY, far())[:2] == (1, "tp1")
    thread.join()

    again, server = socket.socketpair()
    with again, server:
        again.sendall(b"".join(heard))
        with pytest.raises(HandshakeError, match="a stranger"):
            greet(server, KEY, far())


class Tapped(socket.socket):
    """A socket that keeps what was sent."""

    def __init__(self, opened: socket.socket, heard: list[bytes]) -> None:
        super().__init__(opened.family, opened.type, opened.proto, opened.detach())
        self.heard = heard

    def sendall(self, data: bytes) -> None:  # type: ignore[override]
        self.heard.append(data)
        super().sendall(data)


def far() -> float:
    return time.monotonic() + 30


def test_a_word_that_is_changed_or_said_again_is_not_heard() -> None:
    for damage in (lambda word: word[:-1] + b"!", lambda word: word, lambda word: b""):
        ours, wire = Pipe()
        theirs, other = Pipe()
        sender = Sealed(wire, b"a" * 32, b"b" * 32)
        receiver = Sealed(theirs, b"b" * 32, b"a" * 32)
        sender.send_bytes(b"words")
        said = ours.recv_bytes()
        other.send_bytes(said)
        assert receiver.recv_bytes(100) == b"words"

        other.send_bytes(damage(said))  # the same again is no better
        with pytest.raises(HandshakeError):
            receiver.recv_bytes(100)
        for end in (ours, wire, theirs, other):
            end.close()
