"""Starts the ranks of a mesh on this host, as torchrun does, and leaves none behind.

This process imports no torch: it starts at once, and hears every signal at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from mnemosyne.machine import num_cores

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
POLL_S = 0.05
KILL_S = 15.0  # from the order to stop until a rank is killed; the watchdog needs less
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# Run in a rank before anything else: the kernel ends it with its launcher, whatever it is at.
# Ctrl-C is blocked until it ends the process without a word.
END_WITH_LAUNCHER = """
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
import ctypes, os, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


def launch_local(command: Sequence[str], world_size: int) -> int:
    """Run one command as every rank of a mesh on this host, and wait for all.

    When one rank fails the others are ended. Ctrl-C is passed on to rank 0, which decides what
    comes of it. No rank outlives this call, and none this process.

    Args:
        command: program, by its full path, and arguments; each rank finds RANK, WORLD_SIZE and so
            on in its environment, as under torchrun.
        world_size: ranks to start.

    Returns:
        The exit status: 0 if all ranks ended well; else that of rank 0 if it failed by itself, or
        of the rank that failed first, 1 if a signal ended it; 128 and the signal after Ctrl-C or
        SIGTERM.
    """
    with _heard_signals() as heard, started_ranks(command, world_size) as ranks:
        return ranks.wait(heard)


class Ranks:
    """Running ranks.

    Args:
        ranks: processes by rank.
    """

    def __init__(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        self._ranks = ranks
        self._heard: list[int] = []  # signals that they are sent, oldest first
        self._running = dict(enumerate(ranks))
        self._failed: dict[int, int] = {}  # statuses by rank, in the order of their ends
        self._is_ending = False
        self._told: int | None = None  # the signal that asked us to end
        self._kill_s: float | None = None  # by time.monotonic, when what still runs is killed

    def end(self) -> None:
        """Have them end, by SIGTERM and in time by SIGKILL, while another thread waits."""
        self._heard.append(signal.SIGTERM)

    def kill(self) -> None:
        """End them at once."""
        _signal(self._running.copy().values(), signal.SIGKILL)

    def wait(self, heard: list[int] | None = None) -> int:
        """The exit status, once no rank is left (see ``launch_local``).

        Args:
            heard: signals to this process, oldest first, as they come; what they mean is done.
        """
        self._heard = self._heard if heard is None else heard
        while self._running:
            for rank, process in list(self._running.items()):
                code = process.poll()
                if code is not None:
                    del self._running[rank]
                    self._ended(rank, process.pid, code)
            while self._heard:
                self._hear(self._heard.pop(0))
            if self._kill_s is not None and time.monotonic() > self._kill_s:
                _signal(self._running.values(), signal.SIGKILL)
            time.sleep(POLL_S)
        return self._status()

    def _ended(self, rank: int, pid: int, code: int) -> None:
        with suppress(ProcessLookupError):  # what it has started itself, such as a compiler
            os.killpg(pid, signal.SIGKILL)
        if code == 0:
            return
        if code == 128 + signal.SIGTERM:  # a rank that heard the signal says so
            code = -signal.SIGTERM
        if code < 0 and not self._is_ending:
            log.error("rank %d, process %d, was ended by %s", rank, pid, _name(-code))
        self._failed[rank] = code
        self._end_others()

    def _end_others(self) -> None:
        """Tell the ranks that still run to end; a stopped one is woken to hear it."""
        if not self._is_ending:
            self._is_ending, self._kill_s = True, time.monotonic() + KILL_S
            _signal(self._running.values(), signal.SIGTERM)
            _signal(self._running.values(), signal.SIGCONT)

    def _hear(self, number: int) -> None:
        if number == signal.SIGINT:
            if 0 in self._running:
                _signal([self._running[0]], signal.SIGINT)
            else:
                self._end_others()
            return
        self._told = number
        self._end_others()

    def _status(self) -> int:
        """The most telling exit status: a rank's own, not that of a signal sent from here."""
        if not self._failed:
            return 0
        if self._told is not None:
            return 128 + self._told
        first, code = next(iter(self._failed.items()))
        code = next((self._failed[r] for r in (0, first) if self._failed.get(r, 0) > 0), code)
        if code > 0:
            return code
        return 128 - code if -code in (signal.SIGINT, signal.SIGTERM) else 1


def _name(number: int) -> str:
    return signal.Signals(number).name


def _signal(processes: Iterable[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)


@contextmanager
def started_ranks(
    command: Sequence[str], world_size: int, *, inherited: Sequence[int] = ()
) -> Iterator[Ranks]:
    """Ranks in sessions of their own, so that a terminal signals the launcher alone.

    The socket of torch's store is bound here, to loopback, and rank 0 inherits it: whoever connects
    before rank 0 has imported torch waits for it.

    Args:
        command: as for ``launch_local``.
        world_size: ranks to start.
        inherited: descriptors that rank 0 has as well, by the same numbers.

    Yields:
        The ranks. Those that still run when the body ends are killed.
    """
    if sys.platform == "linux":
        guard = [sys.executable, "-I", "-S", "-c", END_WITH_LAUNCHER, str(os.getpid())]
        command = [*guard, *command]
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with socket.create_server((HOST, 0), backlog=max(128, world_size)) as server:
            common = _environment(world_size, server.getsockname()[1])
            for rank in range(world_size):
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                kept = (server.fileno(), *inherited) if rank == 0 else ()
                with _ctrl_c_blocked(is_blocked=sys.platform == "linux"):
                    process = subprocess.Popen(
                        command, env=environment, pass_fds=kept, start_new_session=True
                    )
                ranks.append(process)
        yield Ranks(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


@contextmanager
def _ctrl_c_blocked(*, is_blocked: bool) -> Iterator[None]:
    """Hold Ctrl-C back from processes started meanwhile, until they are ready for it."""
    if not is_blocked:
        yield
        return
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _environment(world_size: int, port: int) -> dict[str, str]:
    """The environment of a rank, as under torchrun; threads are shared unless the user set them."""
    environment = {name: value for name, value in os.environ.items() if "TORCHELASTIC" not in name}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // world_size)))
    return environment | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
    }


@contextmanager
def _heard_signals() -> Iterator[list[int]]:
    """Signals that come while the body runs; those that were ignored before still are."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    numbers = (signal.SIGINT, *ENDING)
    old = {number: signal.getsignal(number) for number in numbers}
    old = {number: handler for number, handler in old.items() if handler != signal.SIG_IGN}
    for number in old:
        signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
