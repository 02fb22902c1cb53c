"""The soak of the server in its short form: clients that come and go leave nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mnemosyne.model_zoo.needle import write_needle
from tools.soak_http import Found, soak, soaked


def test_clients_that_misbehave_leave_nothing_behind(tmp_path: Path) -> None:
    model = str(write_needle(tmp_path / "needle"))
    with soaked(model, is_front=False) as (server, expected):
        found = asyncio.run(soak(server, expected, seconds=6, clients=40, seed=1))

    assert found.faults() == []
    assert len(found.ends) == 8, "every manner of ending came up"


def test_what_is_left_behind_is_told() -> None:
    found = Found(1.0, num_pages=2, num_files=1, wrong=["another answer"], growth_bytes=2**30)

    assert found.faults() == ["another answer", "2 pages are left", "1 descriptors are left"]
    assert found.loads() == ["memory grew by 1024 MiB"]
