"""The helper that starts ranks gives back what they return, and never hangs on one that fails."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import RankError, run_ranks, start_ranks


def sum_of_ranks(start: int) -> Tensor:
    dist.init_process_group("gloo")
    x = torch.tensor([start + dist.get_rank()])
    dist.all_reduce(x)
    return x


def fail_on_rank_1() -> None:
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        raise ValueError("made to fail")
    dist.barrier()


def exit_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        os._exit(7)


def wait_for_a_signal() -> None:
    signal.pause()


def test_results_come_by_rank() -> None:
    results = run_ranks(sum_of_ranks, 3, 10)

    assert results == [torch.tensor([33])] * 3


def test_a_failing_rank_ends_the_run_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed:.*ValueError: made to fail"):
        run_ranks(fail_on_rank_1, 2)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RankError, match="rank 1 died with exit code 7"):
        run_ranks(exit_on_rank_1, 2)


def test_ranks_that_do_not_end_are_killed() -> None:
    started_s = time.monotonic()

    with (
        start_ranks(wait_for_a_signal, 2) as ranks,
        pytest.raises(RankError, match=r"ranks \[0, 1\] did not end within 0.2 s"),
    ):
        ranks.results(timeout_s=0.2)

    assert not any(process.is_alive() for process in ranks.processes)
    assert time.monotonic() - started_s < 60
