"""The GPU suite runs before a GPU is at hand: tiny, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_gpu_suite_runs_on_cpu_and_reports_every_section(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"

    done = subprocess.run(
        [sys.executable, "tools/gpu_suite.py", "--cpu-smoke", "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    report = json.loads(path.read_text())
    assert done.returncode == 0, report
    assert {"commit", "versions", "sections", "smoke"} <= report.keys()
    results = {name: section["result"] for name, section in report["sections"].items()}
    assert results["needle"]["float32 256"]["found"]
    assert results["needle"]["float32 256"]["same_as_cpu"]
    assert results["machine"]["copy"]["GB_s"] > 0
    assert results["decode"]["triton 256"]["GB_s"] > 0
    assert results["chunk"]["triton 256"]["TFLOP_s"] > 0
    assert "unavailable" in results["decode"]["sdpa cudnn 256"]  # a refusal is a result
    assert len(results["configs"]) == 2
    assert results["fused"]["rotate_and_write 4 triton"]["GB_s"] > 0
    for entry in results["correct"].values():
        assert all(entry[key]["error"] <= entry[key]["budget"] for key in ("out", "lse"))
