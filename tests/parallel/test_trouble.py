"""Of all that ranks complain about, the cause is told from what follows from it."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnemosyne.parallel.collectives import all_reduce_sum
from mnemosyne.parallel.mesh import Axis
from mnemosyne.parallel.trouble import Kind, Trouble, judge
from mnemosyne.parallel.whereabouts import Whereabouts, broken_stack, live_stack, locate

LABELS = {rank: f"pp0/kvp0/tp{rank}" for rank in range(4)}
COMPUTING = Whereabouts("step 7", 12.0, None, "layers.py:9 forward")
WAITING = Whereabouts("step 7", 12.0, "all_reduce_sum over tp", "collectives.py:9 all_reduce_sum")
IDLE = Whereabouts()

FAILED = Trouble(3, Kind.FAILED, "MemoryError: no room", COMPUTING)
LOST = Trouble(1, Kind.LOST, "its connection was closed")
BROKEN = Trouble(2, Kind.BROKEN, "RuntimeError: closed by peer", WAITING)
STUCK = Trouble(2, Kind.STUCK, "the limit was 10.0 s", WAITING)
TOLD = Trouble(0, Kind.TOLD, "SIGTERM", WAITING)


@pytest.mark.parametrize(
    ("troubles", "said"),
    [
        (
            [BROKEN, TOLD, LOST],
            "rank 1 (pp0/kvp0/tp1) was lost: its connection was closed",
        ),
        (
            [LOST, Trouble(2, Kind.LOST, "its host does not answer")],
            "ranks 1 (pp0/kvp0/tp1), 2 (pp0/kvp0/tp2) were lost: its connection was closed",
        ),
        (
            [BROKEN, FAILED],
            "rank 3 (pp0/kvp0/tp3) failed in step 7 (layers.py:9 forward): MemoryError: no room",
        ),
        (
            [TOLD, BROKEN],
            "rank 2 (pp0/kvp0/tp2) failed in step 7, all_reduce_sum over tp (collectives.py:9): "
            "RuntimeError: closed by peer",
        ),
        ([TOLD], "rank 0 (pp0/kvp0/tp0) was told to end: SIGTERM"),
    ],
)
def test_the_cause_is_named(troubles: list[Trouble], said: str) -> None:
    assert judge(troubles, {}, LABELS) == said


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (
            {0: WAITING, 1: COMPUTING, 2: WAITING, 3: IDLE},
            "rank 1 (pp0/kvp0/tp1) is stuck in step 7 (layers.py:9 forward), for 12.0 s; "
            "the limit was 10.0 s",
        ),
        (
            {0: WAITING, 1: COMPUTING, 2: WAITING, 3: None},
            "rank 3 (pp0/kvp0/tp3) did not answer; the limit was 10.0 s",
        ),
        (
            {0: WAITING, 1: WAITING, 2: WAITING, 3: WAITING},
            "rank 2 (pp0/kvp0/tp2) is stuck in step 7, all_reduce_sum over tp (collectives.py:9), "
            "for 12.0 s; the limit was 10.0 s",
        ),
    ],
)
def test_the_rank_that_holds_the_others_up_is_named(
    answers: dict[int, Whereabouts | None], said: str
) -> None:
    assert judge([STUCK], answers, LABELS) == said


def test_an_exception_in_a_collective_is_told_with_its_axis() -> None:
    broken_axis: Any = Axis("tp", 2, 0, SimpleNamespace())  # no group at all
    with pytest.raises((AttributeError, TypeError, ValueError)) as caught:
        all_reduce_sum(torch.ones(1), broken_axis)

    collective, place = locate(broken_stack(caught.value))

    assert collective == "all_reduce_sum over tp"
    assert place.startswith("collectives.py:")


def test_the_first_cause_of_an_exception_tells_where_it_was() -> None:
    def wrap() -> None:
        try:
            raise MemoryError("no room")
        except MemoryError as error:
            raise RuntimeError("the stage failed") from error

    with pytest.raises(RuntimeError) as caught:
        wrap()

    collective, place = locate(broken_stack(caught.value))
    assert collective is None
    assert place.startswith("test_trouble.py:")


def test_a_thread_that_computes_is_in_no_collective() -> None:
    collective, place = locate(live_stack(sys._getframe()))

    assert collective is None
    assert place.endswith("test_a_thread_that_computes_is_in_no_collective")
