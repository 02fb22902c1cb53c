"""The program that shows whether a change to the scheduler changes its plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from mnemosyne.schedule import prefill
from tools.compare_plans import Workload, check, save

BUSY = 6  # a workload of a thousand plans with many decodes, several groups and long prompts
SMALL = (9, 33)  # one with outputs that grow, one with shared prefixes


def test_a_workload_gives_the_same_plans_each_time_and_serves_everyone(tmp_path: Path) -> None:
    path = str(tmp_path / "plans")
    num_saved = save(path, [BUSY])

    assert check(path) == (num_saved, [])
    workload = Workload(BUSY)
    assert sum(1 for _ in workload.plans()) == num_saved > 100
    assert workload.scheduler.num_running == workload.scheduler.num_waiting == 0


def test_some_workloads_share_prefixes_and_some_set_requests_back() -> None:
    plans = [plan for number in SMALL for plan in Workload(number).plans()]

    assert any(hit.num_tokens for plan in plans for hit in plan.hits)
    assert any(plan.set_back for plan in plans)


def test_a_scheduler_that_decides_otherwise_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "plans")
    num_saved = save(path, [BUSY])
    solve = prefill.solve_chunk

    monkeypatch.setattr(
        prefill, "solve_chunk", lambda *args, **rule: min(solve(*args, **rule), 480)
    )
    num_equal, differences = check(path)

    assert num_equal < num_saved
    assert [difference.partition(",")[0] for difference in differences] == [f"workload {BUSY}"]
