"""The control channel loses nothing, and names a rank that is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import zmq
from torch.distributed import HashStore

from mnemosyne.parallel.address import find, listening_interface
from mnemosyne.parallel.control import DriverChannel, FollowerChannel, Interrupted, Message, Stop
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
    plans = [plan(index) for index in range(2000)]
    sent: list[Message] = [*plans, Interrupted("ValueError", "no"), Stop()]
    with channels(HashStore()) as (driver, followers):
        for each in plans:
            driver.send_plan(each)
        driver.send_interrupted(ValueError("no"))
        driver.send_stop()

        received = [[follower.recv() for _ in sent] for follower in followers]

    assert received == [sent] * len(followers)


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


def test_a_stranger_is_not_taken_for_a_rank() -> None:
    store = HashStore()
    with ThreadPoolExecutor() as threads, zmq.Context() as context:
        opening = threads.submit(DriverChannel, store, 2, timeout_s=1)
        address = find(store, "control", rank=1)
        with context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.IDENTITY, b"1")
            stranger.connect(f"tcp://{address.host}:{address.port}")
            stranger.send(b"not the secret")

            with pytest.raises(RuntimeError, match="ranks 1 did not connect"):
                opening.result()


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
    interface = listening_interface(environment)

    assert (interface.bind, interface.public) == ("127.0.0.1", "127.0.0.1")
