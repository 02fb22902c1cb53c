"""When one rank dies, fails or is stuck, all end soon, and say which one, where, and why."""

from __future__ import annotations

import itertools
import logging
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mnemosyne.parallel.address import default_store
from mnemosyne.parallel.board import open_board
from mnemosyne.parallel.collectives import all_reduce_sum
from mnemosyne.parallel.mesh import Axis
from mnemosyne.parallel.watchdog import FIRST_STEP_S, UNKNOWN_STEP_S, Watchdog, step_limit
from tests.ranks import Ranks, start_ranks

WORLD_SIZE = 4
GONE_S = 10.0
LIMIT_S = 2.0

Act = Callable[[int, int], None]  # what a rank does in a step before it meets the others


def work(folder: Path, act: Act, has_board: bool = False) -> None:
    """Meet in one step after another until something happens."""
    rank = int(os.environ["RANK"])
    with joined(folder, rank) as watchdog:
        world = dist.group.WORLD
        assert world is not None
        # as on a host with a core for each rank, whatever this one has
        board = open_board(world, axis="tp", ranks_on_host=1) if has_board else None
        assert has_board == (board is not None)
        axis = Axis("tp", WORLD_SIZE, rank, world, board=board)
        for step in itertools.count():
            with watchdog.watch(f"step {step}", limit_s=LIMIT_S):
                act(rank, step)
                all_reduce_sum(torch.ones(1000), axis)
            if step == 3:
                (folder / f"{rank}.ready").touch()


@contextmanager
def joined(folder: Path, rank: int) -> Iterator[Watchdog]:
    logging.getLogger("mnemosyne").addHandler(logging.FileHandler(folder / f"{rank}.log"))
    dist.init_process_group("gloo")
    watchdog = Watchdog(
        default_store(), rank=rank, world_size=dist.get_world_size(), label=f"pp0/kvp0/tp{rank}"
    )
    watchdog.on_end = (folder / f"{rank}.end").write_text
    yield watchdog
    watchdog.close()


def do_nothing(rank: int, step: int) -> None:
    time.sleep(0.001)


def sleep_on_rank_2(rank: int, step: int) -> None:
    if (rank, step) == (2, 5):
        time.sleep(1000)


def fail_on_rank_3(rank: int, step: int) -> None:
    if (rank, step) == (3, 5):
        raise MemoryError("no room for 3 GiB\nand some details")


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s, f"it did not happen within {seconds} s"
        time.sleep(0.02)


def wait_until_ready(ranks: Ranks, folder: Path) -> None:
    wait_until(lambda: len(list(folder.glob("*.ready"))) == len(ranks.processes), 60)


def last_lines(folder: Path) -> dict[int, str]:
    said = {int(path.stem): path.read_text() for path in folder.glob("*.log")}
    return {rank: text.splitlines()[-1] for rank, text in said.items() if text}


@pytest.mark.parametrize("victim", [0, 2])
def test_after_kill_9_all_others_end_and_say_who_was_lost(victim: int, tmp_path: Path) -> None:
    with start_ranks(work, WORLD_SIZE, tmp_path, do_nothing) as ranks:
        wait_until_ready(ranks, tmp_path)
        others = [p for rank, p in enumerate(ranks.processes) if rank != victim]
        os.kill(ranks.processes[victim].pid or 0, signal.SIGKILL)
        # as torchrun does when it notices
        for process in others:
            os.kill(process.pid or 0, signal.SIGTERM)

        wait_until(lambda: not any(process.is_alive() for process in others), GONE_S)

        assert all(process.exitcode == 1 for process in others)
    lines = last_lines(tmp_path)
    assert len(lines) == WORLD_SIZE - 1
    name = "the driver" if victim == 0 else f"pp0/kvp0/tp{victim}"
    for rank, line in lines.items():
        assert f"rank {victim} ({name}) was lost: its connection was closed" in line
        assert f"pp0/kvp0/tp{rank} was in step " in line
        assert "(collectives.py:" in line or "(test_watchdog.py:" in line
    assert any("all_reduce_sum over tp" in line for line in lines.values())


def test_an_exception_on_one_rank_is_what_all_report(tmp_path: Path) -> None:
    with start_ranks(work, WORLD_SIZE, tmp_path, fail_on_rank_3) as ranks:
        wait_until(lambda: not any(process.is_alive() for process in ranks.processes), 60)

        assert all(process.exitcode == 1 for process in ranks.processes)
    said = "rank 3 (pp0/kvp0/tp3) failed in step 5 (test_watchdog.py:"
    for line in last_lines(tmp_path).values():
        assert said in line
        assert "MemoryError: no room for 3 GiB;" in line
    assert "Traceback" in (tmp_path / "3.log").read_text()
    assert said in (tmp_path / "0.end").read_text()


@pytest.mark.parametrize(
    "has_board",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="boards need x86-64"),
        ),
    ],
)
def test_a_stuck_rank_is_found_among_those_that_wait_for_it(
    has_board: bool, tmp_path: Path
) -> None:
    with start_ranks(work, WORLD_SIZE, tmp_path, sleep_on_rank_2, has_board) as ranks:
        wait_until_ready(ranks, tmp_path)
        wait_until(
            lambda: not any(process.is_alive() for process in ranks.processes), LIMIT_S + GONE_S
        )

        assert all(process.exitcode == 1 for process in ranks.processes)
    for line in last_lines(tmp_path).values():
        assert line.startswith("rank 2 (pp0/kvp0/tp2) is stuck in step 5 (test_watchdog.py:")
        assert f"the limit was {LIMIT_S} s" in line
        assert line.count("is stuck") == 1
    waiting = {rank: line for rank, line in last_lines(tmp_path).items() if rank != 2}
    assert all("was in step 5, all_reduce_sum over tp (" in line for line in waiting.values())


def end_in_turn(folder: Path) -> bool:
    """Ranks that are done leave one after the other, rank 0 first."""
    rank = int(os.environ["RANK"])
    usual = _handlers()  # a shell starts what it runs in the background with SIGINT ignored
    with joined(folder, rank) as watchdog:
        with watchdog.watch("step 0", limit_s=LIMIT_S):
            dist.all_reduce(torch.zeros(1))
        time.sleep(0.5 * rank)
    return _handlers() == usual


def _handlers() -> tuple[object, object]:
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


def leave_early(folder: Path) -> None:
    """Rank 1 leaves with an error while the others load."""
    rank = int(os.environ["RANK"])
    with joined(folder, rank) as watchdog:
        if rank == 1:
            watchdog.close(ValueError("model must be there\nreally"))
            return
        with watchdog.watch("loading", is_fatal=False):
            time.sleep(1000)


def interrupt_a_step(folder: Path) -> list[str]:
    """Ctrl-C goes to all ranks of a terminal; rank 0 hears it once its step is complete."""
    rank = int(os.environ["RANK"])
    seen = []
    with joined(folder, rank) as watchdog:
        try:
            with watchdog.watch("step 0", limit_s=60):
                os.kill(os.getpid(), signal.SIGINT)
                dist.all_reduce(torch.zeros(1))
                seen.append("complete")
        except KeyboardInterrupt:
            seen.append("interrupted")
    return seen


def test_ranks_that_are_done_leave_without_a_word(tmp_path: Path) -> None:
    with start_ranks(end_in_turn, 3, tmp_path) as ranks:
        assert ranks.results(60) == [True] * 3
    assert [path.read_text() for path in tmp_path.glob("*.log")] == [""] * 3


def test_a_rank_that_leaves_with_an_error_ends_those_that_wait_for_it(tmp_path: Path) -> None:
    with start_ranks(leave_early, 3, tmp_path) as ranks:
        others = [ranks.processes[0], ranks.processes[2]]
        wait_until(lambda: not any(process.is_alive() for process in others), 60)

        assert all(process.exitcode == 1 for process in others)
    said = "rank 1 (pp0/kvp0/tp1) ended before the others: ValueError: model must be there; "
    assert said + "pp0/kvp0/tp0 was in loading (" in last_lines(tmp_path)[0]
    assert said + "pp0/kvp0/tp2 was in loading (" in last_lines(tmp_path)[2]


def test_ctrl_c_waits_for_the_end_of_the_step_and_only_rank_0_hears_it(tmp_path: Path) -> None:
    with start_ranks(interrupt_a_step, 3, tmp_path) as ranks:
        results = ranks.results(60)

    assert results == [["complete", "interrupted"], ["complete"], ["complete"]]


def test_the_limit_of_a_step_follows_its_predicted_time() -> None:
    assert [step_limit(seconds) for seconds in (0.001, 0.5, 3.0)] == [10.0, 10.0, 60.0]
    assert step_limit(0.0) == UNKNOWN_STEP_S


def test_the_first_steps_have_time_to_compile_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(
        Watchdog, "watch", lambda self, name, *, limit_s: limits.append(limit_s) or nullcontext()
    )
    watchdog = object.__new__(Watchdog)

    for index, predicted_s in ((0, 0.0), (0, 0.1), (15, 30.0), (16, 0.1)):
        watchdog.watch_step(index, predicted_s)

    assert limits == [UNKNOWN_STEP_S, FIRST_STEP_S, 600.0, 10.0]
