"""The GPU suite runs before a GPU is at hand: tiny, in Triton's interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.kernels.tile import TileConfig
from tools import gpu_suite
from tools.gpu_suite import Report, faster, fastest_configs, run_section, write_table

ROOT = Path(__file__).resolve().parent.parent.parent
# of the packages of this project, a machine with a GPU need not have these
MAY_BE_MISSING = ("hydra", "omegaconf", "zmq", "msgspec", "transformers", "fastapi")


def timed(**seconds: float) -> dict[str, Any]:
    return {"result": {key.replace("_", " "): {"seconds": s} for key, s in seconds.items()}}


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
    assert results.keys() == gpu_suite.SECTIONS.keys()
    assert results["needle"]["float32 256"]["found"]
    assert results["needle"]["float32 256"]["same_as_cpu"]
    assert results["far"]["bfloat16 128"]["found"]
    assert results["machine"]["copy"]["GB_s"] > 0
    assert results["decode"]["triton 128"]["percent_of_copy"] > 0
    assert results["chunk"]["triton 128"]["percent_of_matmul"] > 0
    assert "unavailable" in results["decode"]["sdpa cudnn 128"]  # a refusal is a result
    assert len(results["configs"]) == 4
    assert results["step"].keys() == {"eager 150", "replayed 150"}
    for entry in results["triton"].values():
        errors = (entry[key] for key in ("out", "lse") if key in entry)
        assert all(e["error"] <= e["budget"] for e in errors)
        assert "unavailable" not in entry
        assert entry.get("same_bits", True)


def test_the_gpu_suite_needs_neither_hydra_nor_the_channel_between_ranks() -> None:
    sections = ", ".join(f"tools.gpu.{name}" for name, _ in set(gpu_suite.SECTIONS.values()))
    program = f"""
import sys
import tools.gpu_suite, {sections}, mnemosyne.llm, mnemosyne.model_zoo.haystack
print([name for name in {MAY_BE_MISSING} if name in sys.modules])
"""

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert done.stdout == "[]\n", done.stderr


def test_a_section_that_is_killed_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\necho \'{"a": {"GB_s": 50}}\'\nprintf \'{"b"\'\nexec sleep 60\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setitem(gpu_suite.SECTIONS, "decode", ("speed", 2))
    path = tmp_path / "benchmarks" / "gpu.json"
    report = Report(path, smoke=False)
    report.begin("machine")
    report.add("machine", "copy", {"GB_s": 200})

    run_section(report, False, {}, time.perf_counter() + 60, "decode")

    section = json.loads(path.read_text())["sections"]["decode"]
    assert section["result"] == {"a": {"GB_s": 50, "percent_of_copy": 25}}
    assert section["failed"] == "took over 2 s"
    assert report.failed(["machine", "decode"]) == ["decode"]


def test_a_copy_without_a_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(gpu_suite.commit_here()) in (0, 40)  # of a checkout, or of an archive
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    assert gpu_suite.commit_here() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_suite.commit_here() == ""


def test_no_section_starts_when_the_time_is_up() -> None:
    report = Report(None, smoke=False)

    run_section(report, False, {}, time.perf_counter(), "decode")

    assert report.sections["decode"]["failed"].startswith("no time is left")


@pytest.mark.parametrize(
    ("section", "name"),
    [
        (timed(triton_65536=1.0, flex_65536=2.0, triton_8192=2.0, flex_8192=1.0), "triton"),
        (timed(triton_65536=1.0, flex_65536=2.0, triton_131072=2.0, flex_131072=1.0), "flex"),
        (timed(flex_65536=2.0), "flex"),
        (timed(triton_65536=1.0), "flex"),
    ],
)
def test_the_faster_backend_is_that_of_long_contexts(section: dict[str, Any], name: str) -> None:
    assert faster(section) == name


def test_the_table_holds_the_fastest_config_that_is_right(tmp_path: Path) -> None:
    path, fields = tmp_path / "table.json", {"block_m": 16, "block_n": 64, "num_warps": 4}
    path.write_text('{"8.0": {}}')
    entries = {
        f"decode D128 N128 {stages}": {
            "shape": "decode D128 N128",
            "config": fields | {"num_stages": stages, "descriptor": False},
        }
        | ({"seconds": 4.0 - stages} if stages < 4 else {"unavailable": "too much"})
        for stages in (1, 2, 3, 4)
    }
    sections = {
        "machine": {"result": {"device": {"capability": "9.0"}}},
        "triton": {"result": {"decode D128 N128 3": {"failed": "wrong"}}},
        "configs": {"result": entries},
        "decode": timed(triton_65536=1.0, flex_65536=2.0),
        "chunk": timed(triton_65536=2.0, flex_65536=1.0),
    }

    write_table(sections, path)

    table = json.loads(path.read_text())
    assert table.keys() == {"8.0", "9.0"}
    assert (table["9.0"]["decode"], table["9.0"]["chunk"]) == ("triton", "flex")
    configs = table["9.0"]["configs"]
    assert configs == fastest_configs(sections)
    assert TileConfig(**configs["decode D128 N128"]).num_stages == 2
