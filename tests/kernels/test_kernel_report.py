"""Every kernel compiles ahead of time for three generations of GPUs, and nothing spills."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def report(*patterns: str) -> list[tuple[str, int, int, int]]:
    """Label, registers, shared and stack bytes of each line; outside the interpreter."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "tools/kernel_report.py", *patterns],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = re.findall(r"^(sm_.*?) +(\d+) +(\d+) +(\d+) +[\d.]+ *$", done.stdout, re.MULTILINE)
    return [(label, *map(int, numbers)) for label, *numbers in lines]


def test_the_kernels_of_the_usual_model_do_not_spill() -> None:
    lines = report(
        "used (paged_(decode|chunk) bf16 D128 N128|merge)",
        "sm_90 used hopper_chunk bf16 D128",
    )

    assert len(lines) == 3 * 3 + 1
    for label, registers, _, stack_bytes in lines:
        assert stack_bytes == 0, label
        assert registers <= most_registers(label), label


def most_registers(label: str) -> int:
    """Per thread: what lets enough blocks share a processor."""
    if "paged_chunk" in label:
        return 255
    if "hopper_chunk" in label:
        return 168  # of each before warps that compute take those of the one that fetches
    return 168 if "paged_decode" in label else 96


@pytest.mark.slow
def test_no_kernel_that_may_be_used_spills() -> None:
    lines = report("used")

    assert len(lines) == 3 * (7 * 2 + 1) + 3
    assert not any(stack_bytes for *_, stack_bytes in lines)
