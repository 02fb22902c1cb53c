"""Messages through shared memory: every rank gets all of them, and nothing stays behind."""

from __future__ import annotations

import mmap
import os
import platform
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mnemosyne.config import MeshConfig
from mnemosyne.parallel import board
from mnemosyne.parallel.board import BOARD_BYTES, LINE, Board, open_board
from mnemosyne.parallel.collectives import all_gather, all_reduce_sum
from mnemosyne.parallel.mesh import init_mesh
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or len(os.sched_getaffinity(0)) < 2,
    reason="boards need x86-64 and a core for each of two ranks",
)
NUM_GATHERS = 200


def make_boards(degree: int) -> list[Board]:
    memory = mmap.mmap(-1, degree * (LINE + 2 * BOARD_BYTES))
    return [Board(memory, degree, index, axis="tp") for index in range(degree)]


@pytest.mark.parametrize("degree", [2, 3])
def test_every_rank_gets_the_messages_of_all_however_late_they_are(degree: int) -> None:
    boards = make_boards(degree)
    wrong: list[tuple[int, int]] = []

    def take_part(index: int) -> None:
        sizes, naps = random.Random(0), random.Random(index)
        for n in range(NUM_GATHERS):
            shape = (sizes.choice((1, 7, 300)), 5)
            x = torch.full(shape, 1000.0 * index + n).bfloat16()
            time.sleep(naps.choice((0, 0, 1e-4, 2e-3)))
            boards[index].post(x)
            time.sleep(naps.choice((0, 0, 1e-3)))
            found = boards[index].wait(x)
            expected = [torch.full(shape, 1000.0 * peer + n).bfloat16() for peer in range(degree)]
            if not torch.equal(found, torch.stack(expected)):
                wrong.append((index, n))

    threads = [threading.Thread(target=take_part, args=(index,)) for index in range(degree)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_second_gather_before_the_end_of_the_first_is_a_bug() -> None:
    first, _ = make_boards(2)
    first.post(torch.ones(3))

    with pytest.raises(AssertionError, match="one gather at a time"):
        first.post(torch.ones(3))


def gather_and_look(config: MeshConfig) -> dict[str, Any]:
    axis = init_mesh(config, "cpu").tp
    assert axis.group is not None
    sizes = (1, BOARD_BYTES // 4, BOARD_BYTES // 4 + 1)  # the last one is too large for a board
    xs = [torch.arange(size, dtype=torch.float32) + axis.index for size in sizes]
    crowded = open_board(axis.group, axis="tp", ranks_on_host=10_000)
    return {
        "has a board": axis.board is not None,
        "in shared memory": os.listdir("/dev/shm"),
        "has one where ranks outnumber cores": crowded is not None,
        "gathered": [all_gather(x, axis)[:, -1].tolist() for x in xs],
        "summed": [all_reduce_sum(x.clone(), axis)[-1].item() for x in xs],
    }


def test_ranks_of_one_host_share_a_board_that_has_no_file() -> None:
    before = set(os.listdir("/dev/shm"))

    for found in run_ranks(gather_and_look, 2, MeshConfig(tp=2)):
        assert found["has a board"]
        assert not found["has one where ranks outnumber cores"]
        last = [0, BOARD_BYTES // 4 - 1, BOARD_BYTES // 4]
        assert found["gathered"] == [[value, value + 1] for value in last]
        assert found["summed"] == [2 * value + 1 for value in last]
        assert {name for name in found["in shared memory"] if "mnemosyne" in name} <= before


def test_memory_without_room_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    before = os.listdir("/proc/self/fd")

    assert board._create(2) is None
    assert os.listdir("/proc/self/fd") == before


def test_memory_is_for_its_user_alone_and_keeps_its_size() -> None:
    made = board._create(2)
    assert made is not None
    try:
        assert os.fstat(made).st_mode & 0o777 == 0o600
        with pytest.raises(PermissionError):
            os.ftruncate(made, 0)
    finally:
        os.close(made)


def test_a_descriptor_that_leads_to_another_file_is_no_board(tmp_path: Path) -> None:
    made = board._create(2)
    assert made is not None
    words = board._describe(made)
    assert board._map(words) is not None

    with open(tmp_path / "other", "wb") as other:
        os.dup2(other.fileno(), made)  # as in another space of process ids
        assert board._map(words) is None
    os.close(made)
    assert board._map(words) is None


def look_without_room(config: MeshConfig) -> tuple[bool, list[float]]:
    def no_room(degree: int) -> None:
        return None

    board._create = no_room  # in a process of its own
    axis = init_mesh(config, "cpu").tp
    return axis.board is not None, all_gather(torch.tensor([axis.index]), axis).flatten().tolist()


def test_without_room_for_a_board_messages_go_the_usual_way() -> None:
    assert run_ranks(look_without_room, 2, MeshConfig(tp=2)) == [(False, [0, 1])] * 2
