"""``mnemosyne serve``: streams outlive its ranks, a drain ends all of it with status 0."""

from __future__ import annotations

import os
import signal
import sys
import threading

import httpx
import pytest

from tests.server.command import is_running, served, stream_text

SLOW = pytest.mark.slow


def torchrun(num_ranks: int) -> list[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *words, "-m", "mnemosyne", "serve"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(("mesh.pp=2",), marks=SLOW),
        pytest.param(("mesh.kvp=2", "cache.max_tokens_per_group=4K"), marks=SLOW),
    ],
)
def test_a_stream_goes_on_when_a_rank_is_killed_and_sigterm_drains(words: tuple[str, ...]) -> None:
    with served(*words) as server:
        server.wait_ready()
        whole, first = stream_text(server.url), server.ranks()
        killed = []

        def kill(number: int) -> None:
            if number == 20:
                killed.append(first[-1])
                os.kill(first[-1], signal.SIGKILL)

        assert stream_text(server.url, kill) == whole
        assert killed
        assert "mnemosyne_engine_deaths_total 1" in server.get("/metrics").text
        second = server.ranks()

        def terminate(number: int) -> None:
            if number == 5:
                server.process.send_signal(signal.SIGTERM)
                server.wait_for(lambda: server.get("/ready").status_code == 503)

        assert stream_text(server.url, terminate) == whole
        assert server.end() == 0, server.log
        assert not [pid for pid in (*first, *second) if is_running(pid)]


def test_ctrl_c_in_the_middle_and_a_killed_front_leave_nothing() -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        with served() as server:
            server.wait_for(lambda server=server: bool(server.ranks()))
            ranks = server.ranks()
            if number == signal.SIGKILL:
                server.wait_ready()
            server.process.send_signal(number)
            status = server.end()
            server.lines.append(f"ended with {status}")
            wait_gone(ranks)


def wait_gone(pids: list[int]) -> None:
    done = threading.Event()
    for _ in range(300):
        if not [pid for pid in pids if is_running(pid)]:
            return
        done.wait(0.1)
    raise AssertionError(f"processes are left: {pids}")


def test_a_model_that_cannot_be_served_ends_the_server_with_the_reason() -> None:
    with served("mesh.tp=7") as server:
        assert server.end() == 2
        assert "mesh.tp must divide" in server.log


@SLOW
def test_plain_torchrun_serves_on_rank_0_and_drains_with_status_0() -> None:
    with served("mesh.pp=2", program=torchrun(2)) as server:
        server.wait_ready()
        assert "streams end with this process" in server.log
        assert "torchrun kills ranks 30 s after SIGTERM" in server.log
        assert len(stream_text(server.url, max_tokens=20)) > 0
        assert server.get("/health").status_code == 200
        assert httpx.post(f"{server.url}/drain", timeout=60).json()["drained"]
        assert server.end() == 0, server.log
