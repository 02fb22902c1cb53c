"""Ranks as processes of this machine, as torchrun would start them: each test brings a function."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore, destroy_process_group, is_initialized

HOST = "127.0.0.1"

# One server imports torch once, and every rank is a fork of it: 0.1 s each instead of 3.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "torch.distributed.tensor", __name__])


class RankError(RuntimeError):
    """A rank raised (its traceback is the message), died or did not end in time."""


@dataclass(slots=True, eq=False)
class Ranks:
    """Processes that run one function; ``results`` waits for what it returned on each."""

    processes: list[BaseProcess]
    _answers: list[Connection]
    _store: TCPStore  # the rendezvous lives in the test's own process, as in torchrun's agent
    _results: dict[int, Any] = field(default_factory=dict)

    def results(self, timeout_s: float) -> list[Any]:
        """Returned values by rank.

        Raises:
            RankError: with the traceback of the first rank that failed.
        """
        deadline_s = time.monotonic() + timeout_s
        while len(self._results) < len(self.processes):
            running = [rank for rank in range(len(self.processes)) if rank not in self._results]
            ready = wait([self._answers[r] for r in running], deadline_s - time.monotonic())
            if not ready:
                raise RankError(f"ranks {running} did not end within {timeout_s} s")
            for rank in running:
                if self._answers[rank] in ready:
                    self._results[rank] = self._receive(rank)
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        return [self._results[rank] for rank in range(len(self.processes))]

    def _receive(self, rank: int) -> Any:
        try:
            is_result, value = pickle.loads(self._answers[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join()
            code = self.processes[rank].exitcode
            raise RankError(f"rank {rank} died with exit code {code}") from None
        if not is_result:
            raise RankError(f"rank {rank} failed:\n{value}")
        return value


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Run ``function(*args)`` on every rank, one thread each, and wait.

    Args:
        function: at the top level of a module. It finds RANK, LOCAL_RANK, WORLD_SIZE,
            LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment and initialises
            torch.distributed itself, or has it done; it need not destroy it. Other variables
            that a test sets do not reach it: pass them as arguments.
        world_size: ranks to start.
        args: the same for every rank; pickled.
        timeout_s: after which all ranks are killed.

    Returns:
        What the function returned, by rank.

    Raises:
        RankError: if a rank raised, died or did not end in time; the others are killed then.
    """
    with start_ranks(function, world_size, *args) as ranks:
        return ranks.results(timeout_s)


@contextmanager
def start_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Iterator[Ranks]:
    """As ``run_ranks``, for tests that do something to the processes; on leaving all are killed."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    pipes = [_SERVER.Pipe(duplex=False) for _ in range(world_size)]
    processes = []
    for rank, (_, answer) in enumerate(pipes):
        environment = _environment(rank, world_size, store.port)
        arguments = (environment, answer, function, args)
        processes.append(_SERVER.Process(target=_run, args=arguments, daemon=True))
    try:
        for process, (_, answer) in zip(processes, pipes, strict=True):
            process.start()
            answer.close()  # so that the end of the process is the end of the pipe
        yield Ranks(processes, [reader for reader, _ in pipes], store)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for reader, _ in pipes:
            reader.close()


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        # The store is there already, on a port that nobody can take meanwhile.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run(
    environment: dict[str, str],
    answer: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the tests themselves
    try:
        message = (True, function(*args))
    except BaseException:  # noqa: BLE001  # the test raises it again, SystemExit as well
        message = (False, traceback.format_exc())
    # Plain pickle: torch's own passes tensors as shared memory, which ends with this process.
    answer.send_bytes(pickle.dumps(message))
    answer.close()
    if message[0] and is_initialized():
        destroy_process_group()
