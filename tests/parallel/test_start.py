"""A rank that starts ends by signals and with its launcher, also while it waits in C++."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
GONE_S = 20.0

# a rank whose main thread is deaf, as in a wait of torch for a rank that never comes
DEAF = """
import os, signal, threading
from mnemosyne.parallel.start import started_rank

with started_rank(int(os.environ["RANK"])) as start:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # heard by a thread
    never = threading.Lock()
    never.acquire()
    print("ready", flush=True)
    never.acquire()
"""
HEARING = """
import os, sys, time
from mnemosyne.parallel.start import started_rank
from mnemosyne.process import Terminated

with started_rank(int(os.environ["RANK"])) as termination:
    try:
        print("ready", flush=True)
        time.sleep(1000)
    except Terminated:
        sys.exit("stopped" if termination.came else "?")
"""


def start(program: str, rank: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "RANK": str(rank), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def wait_until_asleep(pid: int) -> None:
    """The main thread has come to its wait: it sleeps each time one looks."""
    num_seen = 0
    while num_seen < 5:
        stat = Path(f"/proc/{pid}/task/{pid}/stat").read_text()
        num_seen = num_seen + 1 if stat.rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_rank_0_though_its_main_thread_is_deaf(number: signal.Signals) -> None:
    with start(DEAF, rank=0) as process:
        wait_until_ready(process)
        wait_until_asleep(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=GONE_S)

    assert process.returncode == 128 + number
    assert said == f"rank 0 ends: {number.name} while it started\n"


def test_rank_0_hears_sigterm_as_an_exception_and_others_are_ended_by_it() -> None:
    for rank, status in ((0, 1), (1, -signal.SIGTERM)):
        with start(HEARING, rank) as process:
            wait_until_ready(process)
            process.terminate()
            _, said = process.communicate(timeout=GONE_S)

        assert process.returncode == status
        assert said == ("stopped\n" if rank == 0 else "")


def test_a_rank_whose_launcher_was_killed_before_it_could_look_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    # as torchrun, whose store is not there any more
    environment = {
        "TORCHELASTIC_RUN_ID": "run",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    with start(HEARING, 1, **environment) as process:
        _, said = process.communicate(timeout=GONE_S)

    assert process.returncode == 1
    assert said == "rank 1 ends: its launcher is gone\n"
