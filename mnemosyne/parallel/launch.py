"""Starts the ranks of a mesh on this host with torch's own launcher, as torchrun does."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

log = logging.getLogger(__name__)

# The second has a level of its own.
LAUNCHER_LOGS = ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api")


def launch_local(command: Sequence[str], world_size: int) -> int:
    """Run one command as every rank of a mesh on this host, and wait for all.

    When one rank fails the others are ended. Ctrl-C reaches all of them; rank 0 decides what comes
    of it. No rank outlives this call.

    Args:
        command: program and arguments; each rank finds RANK, WORLD_SIZE and so on in its
            environment, as under torchrun.
        world_size: ranks to start.

    Returns:
        The exit status: 0 if all ranks ended well; else that of rank 0 if it failed by itself, or
        of the rank that failed first; 130 after Ctrl-C.
    """
    # Imported late: who has one process never needs the launcher.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a port that is free
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # ranks write where we write
    )
    program, *arguments = (_escape(word) for word in command)
    with _own_signals(), _quiet_launcher(), _threads_shared(world_size):
        try:
            elastic_launch(config, program)(*arguments)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            first, failure = error.get_first_failure()
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                log.error("rank %d, process %d, was ended by %s", first, failure.pid, name)
            return _status(codes, first)
        except SignalException as stop:
            return 128 + int(stop.sigval)
    return 0


def _escape(word: str) -> str:
    """A word that the launcher, which replaces ``${local_rank}`` in it, leaves as it is."""
    return word.replace("$", "$$")


def _status(codes: Mapping[int, int], first: int) -> int:
    """The exit status that tells most: a rank's own, not that of a signal it was ended by."""
    code = next((codes[rank] for rank in (0, first) if codes.get(rank, 0) > 0), codes[first])
    return code if code > 0 else 128 - code


@contextmanager
def _own_signals() -> Iterator[None]:
    """Take back the signal handlers that the launcher leaves behind."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in names}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep the launcher from writing about every rank that it ends: the ranks say what matters."""
    loggers = [logging.getLogger(name) for name in LAUNCHER_LOGS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _threads_shared(world_size: int) -> Iterator[None]:
    """Give each rank its share of the cores, unless the user has said how many threads to take."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(max(1, _num_cores() // world_size))
    try:
        yield
    finally:
        del os.environ[name]


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
