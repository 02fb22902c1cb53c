"""``mnemosyne serve``: streams outlive its ranks, a drain ends all of it with status 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import httpx
import pytest

from tests.server.command import is_running, served, stream_text

SLOW = pytest.mark.slow


def torchrun(num_ranks: int, *flags: str) -> list[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, *words, *flags, "-m", "mnemosyne", "serve"]


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


def test_the_drain_command_waits_for_streams_and_for_the_end() -> None:
    drains: list[subprocess.Popen[str]] = []
    with served("serve.grace=0.5s") as server:
        server.wait_ready()
        whole = stream_text(server.url)

        def drain(number: int) -> None:
            if number == 5:
                words = [sys.executable, "-m", "mnemosyne", "drain", server.url]
                drains.append(subprocess.Popen(words, stderr=subprocess.PIPE, text=True))
                server.wait_for(lambda: server.get("/ready").status_code == 503)

        assert stream_text(server.url, drain) == whole
        said = drains[0].communicate(timeout=60)[1]
        assert drains[0].returncode == 0, said
        assert "drained" in said
        assert server.end() == 0, server.log
        again = subprocess.run(drains[0].args, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "url must be of a server that answers" in again.stderr


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


@SLOW
@pytest.mark.parametrize("ends_by", ["front", "torchrun"])
def test_streams_go_on_over_ranks_that_torchrun_starts_and_starts_again(ends_by: str) -> None:
    link = f"serve.link=test-{os.getpid()}-{ends_by}"
    program = torchrun(2, "--max-restarts", "2")
    with served(link) as server, served(link, "mesh.pp=2", program=program) as ranks:
        server.wait_ready()
        whole, first = stream_text(server.url), ranks.ranks()

        def kill(number: int) -> None:
            if number == 20:
                os.kill(first[1], signal.SIGKILL)

        assert stream_text(server.url, kill) == whole
        assert ranks.ranks() != first

        def end(number: int) -> None:
            if number == 5:
                ending = server if ends_by == "front" else ranks
                ending.process.send_signal(signal.SIGTERM)
                server.wait_for(lambda: "draining" in server.log)  # it may be over soon

        assert stream_text(server.url, end) == whole
        assert server.end() == 0, server.log
        # torchrun calls its own end by a signal a failure, however its ranks end
        assert ranks.end() == (0 if ends_by == "front" else 1), ranks.log
