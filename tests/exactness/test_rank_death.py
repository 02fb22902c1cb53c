"""When a rank of a serving mesh is killed the others end soon, say why, and the port is free."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from mnemosyne import LLM, SamplingParams
from tests.model_zoo.tiny import VOCAB_SIZE, tiny_checkpoint
from tests.ranks import run_ranks, start_ranks
from tests.schedule.clocked import Rates

LIMIT_S = 10.0  # from the kill to the end of the last rank
START_S = 90.0


def _serve(path: Path, folder: Path, max_tokens: int) -> list[int]:
    rank = os.environ["RANK"]
    logging.basicConfig(filename=folder / f"rank{rank}.log", force=True)
    with LLM(
        str(path),
        dtype="float64",
        device="cpu",
        schedule={"chunk": 16},
        cache={"max_tokens": 2048, "page_size": 16, "max_tokens_per_group": 32},
        mesh={"pp": 2, "kvp": 2},
        metrics={"path": str(folder / f"steps{rank}.jsonl")},
    ) as llm:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return llm.generate(np.arange(20), params)[0].token_ids


@pytest.mark.parametrize("victim", [0, 3])
def test_a_killed_rank_ends_the_others_within_ten_seconds(victim: int, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", num_layers=2)
    (tmp_path / "run").mkdir()
    steps = tmp_path / "run" / "steps0.jsonl"

    with start_ranks(_serve, 4, path, tmp_path / "run", 40) as ranks:
        _wait_for_lines(steps, 3)
        os.kill(ranks.processes[victim].pid, signal.SIGSTOP)  # so that it is in the middle of a run
        os.kill(ranks.processes[victim].pid, signal.SIGKILL)
        killed_s = time.monotonic()
        for process in ranks.processes:
            process.join(LIMIT_S)
        seconds = time.monotonic() - killed_s
        statuses = [process.exitcode for process in ranks.processes]

    assert seconds < LIMIT_S
    assert statuses[victim] == -signal.SIGKILL
    assert all(status not in (0, None) for status in statuses)
    said = "".join(log.read_text() for log in (tmp_path / "run").glob("rank*.log"))
    label = {0: "rank 0 (the driver)", 3: "pp1/kvp1/tp0"}[victim]
    assert label in said
    if victim != 0:  # without the driver the others may be between two steps
        assert "in step" in said
        assert "request 0 failed with" in said
    (tmp_path / "again").mkdir()
    assert len(run_ranks(_serve, 4, path, tmp_path / "again", 3)[0]) == 3


def _prefill(path: Path, folder: Path) -> None:
    rank = os.environ["RANK"]
    logging.basicConfig(filename=folder / f"rank{rank}.log", force=True)
    with LLM(
        str(path),
        dtype="float64",
        device="cpu",
        schedule={"chunk": 400},
        cache={"max_tokens": 2048, "page_size": 16, "prefix": "off"},
        mesh={"kvp": 2},
        metrics={"path": str(folder / f"steps{rank}.jsonl")},
        predictor=Rates(),
    ) as llm:
        params = SamplingParams(max_tokens=1, temperature=0.0)
        for _ in range(10_000):
            llm.generate(np.arange(900) % VOCAB_SIZE, params)


def test_a_rank_killed_while_slices_are_handed_down_ends_the_other_which_names_it(tmp_path):
    path = tiny_checkpoint(tmp_path / "model", num_layers=2)
    steps = tmp_path / "steps0.jsonl"

    with start_ranks(_prefill, 2, path, tmp_path) as ranks:
        _wait_for_lines(steps, 12)
        os.kill(ranks.processes[1].pid, signal.SIGKILL)
        killed_s = time.monotonic()
        ranks.processes[0].join(LIMIT_S)
        seconds = time.monotonic() - killed_s
        status = ranks.processes[0].exitcode

    assert seconds < LIMIT_S
    assert status not in (0, None)
    records = [json.loads(line) for line in steps.read_text().splitlines()]
    assert any(record["num_handed"] for record in records)
    assert "pp0/kvp1/tp0" in (tmp_path / "rank0.log").read_text()


def _wait_for_lines(path: Path, count: int) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        if path.exists() and len(path.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} has fewer than {count} lines after {START_S} s")
