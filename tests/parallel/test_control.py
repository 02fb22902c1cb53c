"""The control channel loses nothing, and names a rank that is missing."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from unittest.mock import patch

import pytest
import zmq
from torch.distributed import HashStore

from mnemosyne.parallel import address, control
from mnemosyne.parallel.address import Address, announce, find, listening_host
from mnemosyne.parallel.control import DriverChannel, FollowerChannel, Interrupted, Message, Stop
from mnemosyne.parallel.keys import MeshKey
from mnemosyne.request import Sampled
from mnemosyne.schedule.plan import Chunk, Plan, StepResult

WORLD_SIZE = 4


@contextmanager
def channels(store: HashStore) -> Iterator[tuple[DriverChannel, list[FollowerChannel]]]:
    """All ends in one process; zmq neither knows nor cares."""
    with ExitStack() as stack, ThreadPoolExecutor() as threads:
        opening = threads.submit(DriverChannel, store, WORLD_SIZE, timeout_s=30)
        followers = []
        for rank in range(1, WORLD_SIZE):
            followers.append(FollowerChannel(store, rank))
            stack.callback(followers[-1].close)
        driver = opening.result()
        stack.callback(driver.close)
        yield driver, followers


def plan(index: int) -> Plan:
    return Plan(index, (Chunk(request_id=index, start=3, num_tokens=1, samples=True, token_id=9),))


def test_every_rank_gets_every_message_in_order_from_the_first() -> None:
    plans = [plan(index) for index in range(900)]  # all of them may wait: MAX_QUEUED is more
    sent: list[Message] = [*plans, Interrupted("ValueError", "no"), Stop()]
    with channels(HashStore()) as (driver, followers):
        for each in plans:
            driver.send_plan(each)
        driver.send_interrupted(ValueError("no"))
        driver.send_stop()

        received = [[follower.recv() for _ in sent] for follower in followers]

    assert received == [sent] * len(followers)


def test_who_sends_to_a_rank_that_does_not_read_waits_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(control, "MAX_QUEUED", 4)
    large = Interrupted("ValueError", "x" * 1_000_000)  # so that buffers of the kernel fill up
    sent = []

    def send_many() -> None:
        for _ in range(100):
            driver._send(large)
            sent.append(1)

    with channels(HashStore()) as (driver, followers), ThreadPoolExecutor() as threads:
        sending = threads.submit(send_many)
        time.sleep(1)
        num_before = len(sent)
        readings = [threads.submit(lambda f=f: [f.recv() for _ in range(100)]) for f in followers]

        assert all(reading.result(timeout=60) == [large] * 100 for reading in readings)
        sending.result(timeout=60)

    assert num_before < 100


def test_results_come_back_in_the_order_of_each_rank() -> None:
    def results(rank: int) -> list[StepResult]:
        return [StepResult(index, {rank: Sampled(index)}) for index in range(50)]

    with channels(HashStore()) as (driver, followers):
        for rank, follower in enumerate(followers, start=1):
            for result in results(rank):
                follower.send_result(result)

        received = [driver.recv_result() for _ in range(50 * len(followers))]

    for rank in range(1, WORLD_SIZE):
        assert [result for result in received if rank in result.sampled] == results(rank)


def test_a_channel_may_be_opened_again_over_the_same_store() -> None:
    store = HashStore()
    for index in range(2):
        with channels(store) as (driver, followers):
            driver.send_plan(plan(index))

            assert [follower.recv() for follower in followers] == [plan(index)] * len(followers)


def test_a_rank_that_does_not_connect_is_named() -> None:
    store = HashStore()
    follower: list[FollowerChannel] = []
    thread = threading.Thread(target=lambda: follower.append(FollowerChannel(store, 2)))
    thread.start()

    with pytest.raises(RuntimeError, match="ranks 1, 3 did not connect within 1 s"):
        DriverChannel(store, WORLD_SIZE, timeout_s=1)

    thread.join()
    follower[0].close()


def port_of_driver(store: HashStore) -> int:
    """The port that rank 0 has announced, as strangers find it out; no rank's turn is taken."""
    return Address(**json.loads(store.get("mnemosyne/control/1"))).port


@pytest.mark.parametrize("knows", ["nothing", "the server's key"])
def test_a_stranger_who_comes_first_cannot_take_the_place_of_a_rank(knows: str) -> None:
    store, key = HashStore(), MeshKey(b"k" * 32)
    with ThreadPoolExecutor() as threads, zmq.Context() as context:
        opening = threads.submit(DriverChannel, store, 2, key=key, timeout_s=30)
        with context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.setsockopt(zmq.IDENTITY, b"1")
            if knows != "nothing":
                public, secret = zmq.curve_keypair()
                stranger.setsockopt(zmq.CURVE_PUBLICKEY, public)
                stranger.setsockopt(zmq.CURVE_SECRETKEY, secret)
                stranger.setsockopt(zmq.CURVE_SERVERKEY, control._curve_keys(key, 0)[0])
            stranger.connect(f"tcp://127.0.0.1:{port_of_driver(store)}")
            stranger.send(b"hello")
            time.sleep(0.5)
            follower = FollowerChannel(store, 1, key=key)
            driver = opening.result()
            driver.send_plan(plan(3))

            assert follower.recv() == plan(3)
            assert not stranger.poll(0)
        follower.close()
        driver.close()


def test_garbage_at_the_port_holds_nobody_up_before_or_after_the_start() -> None:
    store = HashStore()
    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        opening = threads.submit(DriverChannel, store, 2, timeout_s=30)
        port = port_of_driver(store)
        stack.enter_context(strangers(port))
        follower = FollowerChannel(store, 1)
        stack.callback(follower.close)
        driver = opening.result()
        stack.callback(driver.close)
        stack.enter_context(strangers(port))

        for index in range(100):
            driver.send_plan(plan(index))
            assert follower.recv() == plan(index)
            follower.send_result(StepResult(index))
            assert driver.recv_result() == StepResult(index)


@contextmanager
def strangers(port: int) -> Iterator[None]:
    """Connections that say nothing, half a greeting, noise, or that an endless message follows."""
    noise = random.Random(0)
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
    null = greeting[:12] + b"NULL".ljust(20, b"\0") + bytes(32)
    said = [b"", b"\xff", greeting[:30], greeting, null + b"\x04\x26\x05READY"]
    said += [
        greeting + b"\x06" + b"\xff" * 8,
        greeting + b"\x04\xc8\x05HELLO" + noise.randbytes(194),
    ]
    said += [noise.randbytes(noise.randrange(1, 400)) for _ in range(30)]
    with ExitStack() as stack:
        for words in said:
            opened = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            with suppress(OSError):
                opened.sendall(words)
        yield


def test_once_all_ranks_are_there_nobody_else_is_let_in() -> None:
    store, key = HashStore(), MeshKey(b"k" * 32)
    with ThreadPoolExecutor() as threads, ExitStack() as stack:
        opening = threads.submit(DriverChannel, store, 2, key=key, timeout_s=30)
        stack.callback(FollowerChannel(store, 1, key=key).close)
        driver = opening.result()
        stack.callback(driver.close)
        late = HashStore()
        announce(late, "control", Address("127.0.0.1", port_of_driver(store)))
        while driver._socket.poll(0):  # more than one hello
            driver._socket.recv_multipart()
        with patch.object(control, "_identity", lambda rank: b"late"):  # it has the key, though
            stack.callback(FollowerChannel(late, 1, key=key).close)

        assert not driver._socket.poll(1000)


def test_without_curve_nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda name: False)

    with pytest.raises(ValueError, match="pyzmq must be built with CURVE, got"):
        DriverChannel(HashStore(), 2, timeout_s=1)


def test_a_rank_that_is_gone_is_named() -> None:
    with channels(HashStore()) as (driver, followers):
        followers[1].close()

        with pytest.raises(RuntimeError, match="rank 2 is gone"):
            within_s(10, lambda: driver.send_plan(plan(0)))


def within_s(seconds: float, action: Callable[[], None]) -> None:
    """Repeat an action until it raises: the other side needs a moment to notice."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        action()
        time.sleep(0.01)


@pytest.mark.parametrize(
    "environment",
    [
        {"MASTER_ADDR": "10.1.2.3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
        {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "8"},
        {"MASTER_ADDR": "localhost", "WORLD_SIZE": "8"},
        {},
    ],
)
def test_ranks_of_one_host_meet_where_nobody_else_can_come(environment: dict[str, str]) -> None:
    assert listening_host(environment) == "127.0.0.1"


SEVERAL_HOSTS = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


def test_ranks_of_several_hosts_meet_on_the_interface_that_is_named() -> None:
    # documentation addresses: nothing is sent there
    environment = {**SEVERAL_HOSTS, "MASTER_ADDR": "192.0.2.1", "GLOO_SOCKET_IFNAME": "lo"}

    with pytest.raises(ValueError, match=r"must be one that other hosts reach, got 127\.0\.0\.1"):
        listening_host(environment)
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME must be an interface of this host"):
        listening_host({**environment, "GLOO_SOCKET_IFNAME": "none0"})


def test_rank_0_of_several_hosts_never_listens_on_all_interfaces() -> None:
    own = "192.0.2.7"
    with patch.object(address, "_own_address", lambda peer: own):
        assert listening_host({**SEVERAL_HOSTS, "MASTER_ADDR": "192.0.2.1"}) == own
    with (
        patch.object(address, "_own_address", lambda peer: "127.0.1.1"),
        pytest.raises(ValueError, match="resolves its own name; set GLOO_SOCKET_IFNAME"),
    ):
        listening_host({**SEVERAL_HOSTS, "MASTER_ADDR": "node0"})


@pytest.mark.parametrize(
    "value",
    ["", "{", "[]", "5", '{"host": 5, "port": 5}', '{"host": "a", "port": 70000}', "[" * 100_000],
)
def test_an_address_that_somebody_damaged_is_refused(value: str) -> None:
    store = HashStore()
    store.set("mnemosyne/control/1", value)

    with pytest.raises(RuntimeError, match="the address of rank 0 in the store is damaged"):
        find(store, "control", rank=1)
