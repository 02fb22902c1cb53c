"""Load for a server: every request is counted, and goodput knows its bounds."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from mnemosyne import cli
from mnemosyne.config_client import BenchServeConfig
from mnemosyne.load.report import summary
from mnemosyne.load.requests import Outcome, planned
from mnemosyne.load.run import run
from tests.server.conftest import open_needle
from tools.live_server import serving


def test_a_plan_depends_on_its_seed_alone() -> None:
    config = BenchServeConfig(url="http://x/v1", rate=5.0, lengths=[8, 16], long=99, requests=50)

    first, second = planned(config), planned(config)

    assert first == second
    assert config.url == "http://x"
    assert [len(first[0].prompt), first[0].is_long, first[0].start_s] == [99, True, 0.0]
    assert {len(request.prompt) for request in first[1:]} == {8, 16}
    starts = [request.start_s for request in first[1:]]
    assert starts == sorted(starts)
    assert 5 < starts[-1] < 20


def test_refused_and_failed_requests_are_counted_and_are_no_goodput() -> None:
    outcomes = [
        Outcome(0, 5, False, ttft_s=0.1, tbt_s=[0.1, 0.1], seconds=1.0, num_tokens=3),
        Outcome(1, 5, False, ttft_s=3.0, tbt_s=[0.1], seconds=4.0, num_tokens=2),
        Outcome(2, 5, False, ttft_s=0.1, tbt_s=[0.1, 0.9], seconds=2.0, num_tokens=3),
        Outcome(3, 5, False, seconds=0.1, status=429, error="status 429: full"),
        Outcome(4, 5, False, seconds=0.1, status=500, error="status 500: gone"),
        Outcome(5, 5, False, seconds=0.1, error="broke off"),
    ]

    lines = summary(outcomes, 2.0, 0.2)

    assert lines[0] == "6 requests in 4.0 s: 3 served, 1 refused, 2 failed"
    assert lines[1].startswith("goodput: 0.25 requests/s (1 of 6 ")
    assert lines[2] == "output: 2.0 tokens/s"
    assert "1 times: status 429: full" in lines


def test_a_server_under_load_is_measured_and_its_refusals_are_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "out.jsonl", tmp_path / "out.png"
    words = ["requests=10", "lengths=[8,300]", "max_tokens=5", "long=5000"]
    with open_needle() as llm, serving(llm.engine) as live:
        status = cli.main(
            ["bench", "serve", f"url={live.url}/v1", *words, f"output={output}", f"plot={plot}"]
        )

    printed = capsys.readouterr().out
    outcomes = [json.loads(line) for line in output.read_text().splitlines()]
    assert status == 0
    assert "11 requests" in printed
    assert "10 served, 1 refused, 0 failed" in printed
    assert "fit the cache of 4096 tokens" in printed
    assert [outcome["num_tokens"] for outcome in outcomes] == [0] + [5] * 10
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_nobody_is_no_server() -> None:
    config = BenchServeConfig(url="http://127.0.0.1:9")

    with pytest.raises(ValueError, match="url must be that of an OpenAI-compatible server"):
        asyncio.run(run(config, planned(config)))
