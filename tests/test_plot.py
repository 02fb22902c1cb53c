"""Claims about step records on disk and the picture drawn from them."""

import subprocess
import sys
from pathlib import Path

import pytest

from mnemosyne.metrics import StepLog, StepRecord, percentiles, read_steps

TOOL = Path(__file__).parents[1] / "tools" / "plot_run.py"


def _record(index: int) -> StepRecord:
    return StepRecord(
        index=index,
        time_s=0.2 * index,
        num_decodes=3,
        chunks=((7, 512 * index, 512),) if index % 3 else (),
        predicted_s=0.19,
        actual_s=0.2,
        pages_used=index,
        num_pages=100,
        num_running=4,
        num_waiting=0,
    )


def test_step_records_survive_the_disk(tmp_path):
    records = [_record(index) for index in range(5)]

    with StepLog(tmp_path / "steps.jsonl") as step_log:
        for record in records:
            step_log.write(record)

    assert read_steps(tmp_path / "steps.jsonl") == records


def test_the_tool_draws_a_run(tmp_path):
    with StepLog(tmp_path / "steps.jsonl") as step_log:
        for index in range(5):
            step_log.write(_record(index))

    arguments = [str(tmp_path / "steps.jsonl"), str(tmp_path / "run.png"), "0.2"]
    done = subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("{}\n")

    with pytest.raises(ValueError, match=r"steps\.jsonl:1 must be a step record"):
        read_steps(path)


def test_a_log_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.path must be a file that can be written"):
        StepLog(tmp_path / "nowhere" / "steps.jsonl")


def test_percentiles_of_nothing_are_nan():
    assert percentiles([1.0, 3.0])[50] == 2.0
    assert all(value != value for value in percentiles([]).values())
