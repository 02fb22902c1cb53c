"""A mesh that is told to end, or stopped: in good order, and the right rank is named."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mnemosyne.parallel.signals import ONE_PRESS_S, Signals
from tests.parallel.test_watchdog import (
    GONE_S,
    LIMIT_S,
    joined,
    last_lines,
    wait_until,
    wait_until_ready,
)
from tests.ranks import start_ranks


def stop_in_step(folder: Path, stopped: int, limit_s: float) -> list[str]:
    """One step in which a rank, or with -1 each of them, is stopped; the test wakes it up."""
    rank = int(os.environ["RANK"])
    with joined(folder, rank) as watchdog, watchdog.watch("step 0", limit_s=limit_s):
        dist.all_reduce(torch.zeros(1))
        (folder / f"{rank}.ready").touch()
        if stopped in (rank, -1):
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.zeros(1))
    return ["complete"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_is_stopped_for_too_long_is_named(stopped: int, tmp_path: Path) -> None:
    with start_ranks(stop_in_step, 3, tmp_path, stopped, LIMIT_S) as ranks:
        wait_until_ready(ranks, tmp_path)
        others = [process for rank, process in enumerate(ranks.processes) if rank != stopped]
        wait_until(lambda: not any(process.is_alive() for process in others), 4 * GONE_S)
        os.kill(ranks.processes[stopped].pid or 0, signal.SIGCONT)
        wait_until(lambda: not ranks.processes[stopped].is_alive(), GONE_S)

        assert all(process.exitcode == 1 for process in ranks.processes)
    lines = last_lines(tmp_path)
    name = "rank 0 (the driver)" if stopped == 0 else "rank 1 (pp0/kvp0/tp1)"
    for rank in {0, 1, 2} - {stopped}:
        assert lines[rank].startswith(f"{name} did not answer; the limit was {LIMIT_S} s")
    assert f"rank {stopped} (" in lines[stopped].partition(";")[0]


@pytest.mark.parametrize(("stopped", "limit_s"), [(1, 60.0), (-1, LIMIT_S)])
def test_a_stop_within_the_bound_or_of_all_ranks_ends_nothing(
    stopped: int, limit_s: float, tmp_path: Path
) -> None:
    with start_ranks(stop_in_step, 3, tmp_path, stopped, limit_s) as ranks:
        wait_until_ready(ranks, tmp_path)
        time.sleep(2 * LIMIT_S)
        for process in ranks.processes:
            os.kill(process.pid or 0, signal.SIGCONT)

        assert ranks.results(60) == [["complete"]] * 3
    assert [path.read_text() for path in tmp_path.glob("*.log")] == [""] * 3


class Told(Exception):
    """Exception that the program of rank 0 makes of SIGTERM."""


def end_by_sigterm(folder: Path, told: int, is_handled: bool) -> str:
    """Steps until the program of rank 0 is told to end, which the others learn of in a step."""
    rank = int(os.environ["RANK"])
    if rank == 0 and is_handled:
        signal.signal(signal.SIGTERM, tell)
    with joined(folder, rank) as watchdog:
        try:
            for step in itertools.count():
                with watchdog.watch(f"step {step}", limit_s=60):
                    is_last = torch.tensor([0])
                    if step == 3 and rank == told:
                        os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.05)
                    dist.all_reduce(is_last)
                if is_last.item():
                    return "told by rank 0"
        except Told:
            with watchdog.watch("the last step", limit_s=60):
                dist.all_reduce(torch.tensor([1]))
            return "finished"


def tell(number: int, frame: object) -> None:
    raise Told


@pytest.mark.parametrize("told", [0, 1])
def test_after_sigterm_the_program_of_rank_0_ends_the_mesh_between_two_steps(
    told: int, tmp_path: Path
) -> None:
    with start_ranks(end_by_sigterm, 3, tmp_path, told, True) as ranks:
        assert ranks.results(60) == ["finished", "told by rank 0", "told by rank 0"]
    said = (tmp_path / "0.log").read_text()
    assert said == f"rank {told} (pp0/kvp0/tp{told}) was told to end: SIGTERM\n"


@pytest.mark.parametrize("told", [0, 1])
def test_after_sigterm_all_ranks_end_where_the_program_does_not_see_to_it(
    told: int, tmp_path: Path
) -> None:
    with start_ranks(end_by_sigterm, 3, tmp_path, told, False) as ranks:
        wait_until(lambda: not any(process.is_alive() for process in ranks.processes), 60)

        assert ranks.processes[0].exitcode == 128 + signal.SIGTERM
    for line in last_lines(tmp_path).values():
        assert f"rank {told} (pp0/kvp0/tp{told}) was told to end: SIGTERM" in line


def signals_at_the_end(folder: Path, number: int) -> list[str]:
    """Rank 0 is told to end while it ends already, which nothing may cut short."""
    rank = int(os.environ["RANK"])
    seen = []
    if rank == 0:
        signal.signal(signal.SIGTERM, tell)
    with joined(folder, rank) as watchdog:
        dist.all_reduce(torch.zeros(1))
        with watchdog.shielded():
            if rank == 0:
                os.kill(os.getpid(), number)
                time.sleep(1.5)  # SIGTERM is passed on by now
            seen.append("shielded")
            watchdog.close()
    return seen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_mesh_that_ends_already_is_not_cut_short(number: signal.Signals, tmp_path: Path) -> None:
    with start_ranks(signals_at_the_end, 2, tmp_path, number) as ranks:
        assert ranks.results(60) == [["shielded"]] * 2


def close_after_the_guard(folder: Path) -> bool:
    """The descriptor that signals went to before is closed when the watchdog gives them back."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    with joined(folder, int(os.environ["RANK"])):
        reader.close()
        writer.close()
    return signal.set_wakeup_fd(-1) == -1


def test_signals_are_given_back_though_who_had_them_is_gone(tmp_path: Path) -> None:
    with start_ranks(close_after_the_guard, 2, tmp_path) as ranks:
        assert ranks.results(60) == [True, True]


def test_a_ctrl_c_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    signals = Signals(is_driver=True, is_busy=lambda ident: False)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # raises nothing
        together = signals.read()
        signal.raise_signal(signal.SIGINT)
        soon = signals.read()
        now_s += ONE_PRESS_S
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        later = signals.read()
    finally:
        signals.close()

    assert (together, soon, later) == ((False, 1), (False, 0), (False, 1))
