"""The soak of the server in its short form: clients that come and go leave nothing behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.needle import write_needle
from tools.live_server import serving
from tools.soak_http import WRITE_S, Found, expect, soak


def test_clients_that_misbehave_leave_nothing_behind(tmp_path: Path) -> None:
    model = str(write_needle(tmp_path / "needle"))
    options = {"schedule": {"chunk": 64}, "cache": {"max_tokens": "16K"}}
    with LLM(model, dtype="float64", device="cpu", **options) as llm:  # type: ignore[arg-type]
        expected = expect(llm)
        with serving(llm.engine, access_log=False, write_timeout=WRITE_S) as live:
            found = asyncio.run(soak(live, llm, expected, seconds=6, clients=40, seed=1))

    assert found.faults() == []
    assert len(found.ends) == 8, "every manner of ending came up"


def test_what_is_left_behind_is_told() -> None:
    found = Found(1.0, num_pages=2, num_files=1, wrong=["another answer"], growth_bytes=2**30)

    assert found.faults() == ["another answer", "2 pages are left", "1 descriptors are left"]
    assert found.loads() == ["memory grew by 1024 MiB"]
