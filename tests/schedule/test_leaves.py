"""Claims about what the scheduler makes of a disk, whose leaves here hold two pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from mnemosyne.cache.leaf_file import Leaf
from mnemosyne.cache.leaf_folder import LeafFolder
from mnemosyne.cache.leaf_storage import Storage
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import WorkModel
from tests.leaves import LAYOUT, WHOLE, pieces_of
from tests.schedule.clocked import PAGE_SIZE, Rates
from tests.schedule.test_prefixes import make_request, starts_of
from tools.damage_leaves import use_small_leaves

SIZE = LAYOUT.leaf_tokens
IDS = list(range(5 * SIZE + 3))


class FakeDisk:
    """Rank 0's way to a folder: leaves are written at once, and are ready when told."""

    def __init__(self, path: Path) -> None:
        self.folder = LeafFolder(Storage(path), LAYOUT, 1 << 20)
        self.local_bytes, self.num_room = LAYOUT.leaf_bytes, 100
        self.ready = 0

    def num_ready(self, request_id: int, first: int) -> int:
        return max(0, self.ready - first)

    def note_used(self, digests: Sequence[bytes]) -> None:
        self.folder.note_used(digests)

    def clear(self) -> None:
        self.folder.clear()

    def write(self, plan: Plan | None) -> list[int]:
        """Write what a plan saves; the positions where those leaves begin."""
        for save in plan.saves if plan is not None else ():
            leaf = Leaf(save.digest, save.before, save.start, save.ids)
            assert leaf.is_consistent
            self.folder.write(leaf, WHOLE, pieces_of(WHOLE), PAGE_SIZE)
        return [save.start for save in plan.saves] if plan is not None else []


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDisk:
    use_small_leaves(monkeypatch.setattr)
    return FakeDisk(tmp_path)


def make_scheduler(disk: FakeDisk, num_pages: int = 100, rate_s: float = 1e-3) -> Scheduler:
    return build_scheduler(
        ScheduleConfig(chunk=16),
        SloConfig(ttft_scale=2.0, ttft_min=0.001),
        num_groups=1,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        max_tokens_per_group=num_pages * PAGE_SIZE,
        predictor=Rates(rate_s),
        work_model=WorkModel([None], 1),
        fingerprint=b"model",
        disk=disk,
    )


def complete(scheduler: Scheduler, plan: Plan, restored: dict[int, int] | None = None) -> None:
    tokens = {chunk.request_id: 1 for chunk in plan.chunks if chunk.samples}
    whole = {piece.request_id: piece.stop - piece.first for piece in plan.restores}
    scheduler.complete(plan, tokens, (), whole | (restored or {}))


def step(scheduler: Scheduler, disk: FakeDisk, restored: dict[int, int] | None = None) -> Plan:
    plan = scheduler.plan(0.0)
    assert plan is not None
    disk.write(plan)
    complete(scheduler, plan, restored)
    return plan


def fill(disk: FakeDisk) -> None:
    """Have another process compute the prompt, and leave what is whole of it."""
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(0, IDS, max_tokens=1))
    while not step(scheduler, disk).chunks[0].samples:
        pass
    scheduler.release(0)
    disk.write(scheduler.plan_saves())
    assert len(disk.folder) == 5


def test_a_prompt_is_computed_from_the_end_of_what_is_restored(disk: FakeDisk) -> None:
    fill(disk)
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(7, IDS))

    first = step(scheduler, disk)
    second = step(scheduler, disk)

    assert [len(fetch.digests) for fetch in first.fetches] == [5]
    assert [(piece.first, piece.stop) for piece in first.restores] == [(0, 5)]
    assert not first.chunks
    assert starts_of(second) == {7: 5 * SIZE}
    assert scheduler.num_restored(7) == 5 * SIZE


def test_a_leaf_that_is_not_whole_and_those_behind_it_are_computed_and_saved(
    disk: FakeDisk,
) -> None:
    fill(disk)
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(7, IDS, max_tokens=1))

    step(scheduler, disk, {7: 2})
    plans = [step(scheduler, disk) for _ in range(2)]
    scheduler.release(7)
    saved = [save.start for plan in plans for save in plan.saves]
    saved += disk.write(scheduler.plan_saves())

    assert starts_of(plans[0]) == {7: 2 * SIZE}
    assert saved == [2 * SIZE, 3 * SIZE, 4 * SIZE]
    assert len(disk.folder) == 5


def test_steps_with_rows_wait_for_no_disk(disk: FakeDisk) -> None:
    fill(disk)
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(1, range(500, 520), max_tokens=9))
    scheduler.add(make_request(7, IDS))

    plans = [step(scheduler, disk) for _ in range(2)]
    disk.ready = 3
    plans.append(step(scheduler, disk))

    assert [len(plan.restores) for plan in plans] == [0, 0, 1]
    assert plans[2].restores[0][1:3] == (0, 3)
    assert all(plan.chunks for plan in plans)


def test_what_is_sooner_computed_is_not_read(
    disk: FakeDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(disk)
    monkeypatch.setattr("mnemosyne.schedule.restores.LEAF_S", 1.0)
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(7, IDS))

    plan = step(scheduler, disk)

    assert not plan.fetches
    assert starts_of(plan) == {7: 0}


def test_a_request_that_is_cancelled_while_it_is_restored_keeps_its_pages_until_then(
    disk: FakeDisk,
) -> None:
    fill(disk)
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(7, IDS))
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.restores

    scheduler.release(7)
    held = scheduler.ledger.num_used
    complete(scheduler, plan)

    assert held > 0
    assert scheduler.ledger.num_used == 0
    assert scheduler.num_running == 0
    assert scheduler.plan(0.0) is None


def test_leaves_whose_pages_went_to_others_are_left_out(disk: FakeDisk) -> None:
    disk.num_room = 0  # the disk is slow
    scheduler = make_scheduler(disk, num_pages=12)
    for request_id, ids in enumerate((IDS, [900 + i for i in IDS])):
        scheduler.add(make_request(request_id, ids, max_tokens=1))
        while not step(scheduler, disk).chunks[0].samples:
            pass
        scheduler.release(request_id)
    disk.num_room = 100

    saved = disk.write(scheduler.plan_saves())

    assert saved == [0, SIZE, 2 * SIZE, 3 * SIZE, 4 * SIZE]  # of the second alone
    assert disk.folder.counts.leaves_skipped == 5


def test_what_broke_is_not_saved(disk: FakeDisk) -> None:
    scheduler = make_scheduler(disk)
    scheduler.add(make_request(0, IDS, max_tokens=1))
    plan = scheduler.plan(0.0)
    assert plan is not None
    complete(scheduler, plan)
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.complete(plan, {}, broken=[0])
    scheduler.release(0)

    saved = [save.start for save in plan.saves] + disk.write(scheduler.plan_saves())

    assert saved == [0, SIZE]
