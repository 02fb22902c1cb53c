"""``mnemosyne simulate`` as a user meets it: its table, its files, and what it refuses."""

from __future__ import annotations

import json
import logging
from importlib import resources
from pathlib import Path

import pytest

from mnemosyne import cli
from mnemosyne.cli.shapes import find_shape, shape_names
from mnemosyne.config import MeshConfig
from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.simulate.footprint import weight_bytes
from tests.simulate.machines import simulate_config

SMALL_RUN = ["simulate", "model=bench", "workload.num_requests=20", "workload.long_max=256K"]


def test_a_run_is_told_in_a_table_and_in_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, output, plot = (tmp_path / name for name in ("r.json", "o.jsonl", "p.png"))
    files = [f"report={report}", f"output={output}", f"plot={plot}"]

    status = cli.main([*SMALL_RUN, "workload.long_share=0.2", *files])

    printed = capsys.readouterr()
    told = json.loads(report.read_text())
    assert status == cli.OK
    assert "bench on 1 h100 (pp 1, kvp 1, tp 1)" in printed.out
    assert "TTFT" in printed.out
    assert told["requests"]["all"]["count"] == 20
    assert logging.getLogger("mnemosyne.serve.records").level == logging.NOTSET, "others log on"
    assert told["requests"]["short"]["count"] + told["requests"]["long"]["count"] == 20
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(output.read_text().splitlines()) == 20


def test_what_a_run_wrote_replays_to_the_same_times(tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"

    cli.main([*SMALL_RUN, "workload.seed=3", f"output={first}"])
    cli.main(["simulate", "model=bench", f"workload.trace={first}", f"output={second}"])

    assert first.read_text() == second.read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=llama8b"], "got 'llama8b'; did you mean llama3_8b?"),
        (["model=bench", "hardware=h10"], "hardware must be one of a100_80, b200,"),
        (["model=bench", "hardware=h10"], "did you mean h100"),
        (["model=bench", "workload.rate=0"], "workload.rate must be a positive number, got 0"),
        (["model=bench", "slo.ttft_min=-1"], "slo.ttft_min must be a positive time, got -1"),
        (["model=bench", "workload.trace=none.jsonl"], "workload.trace must be a readable JSONL"),
        (["model=bench", "mesh.tp=3"], "mesh.tp must divide the 16 query heads"),
        (["model=llama3_405b", "mesh.tp=8"], "model must leave memory for the cache, got"),
        (["model=bench", "cache.max_tokens=1G"], "cache.max_tokens must lie in [1, "),
        (["model=bench", "metrics.trace=t.json"], "metrics.trace must be null in a simulation"),
        (["model=bench", "report=/no/r.json", "workload.num_requests=1"], "report must be a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["simulate", *words])

    error = capsys.readouterr().err.splitlines()[-1]
    assert status == cli.FAILED
    assert error.startswith("error: ")
    assert said in error


def test_a_shape_by_name_is_that_of_the_model(tmp_path: Path) -> None:
    write_needle(tmp_path / "needle")

    assert find_shape("needle") == read_spec(tmp_path / "needle").shape
    assert find_shape("bench") == bench_spec().shape


def test_all_shapes_and_all_hardware_can_be_used() -> None:
    folder = resources.files("mnemosyne.conf") / "hardware"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir())

    assert {"a100_80", "b200", "gb200_nvl72", "h100", "h20", "h200"} <= set(names)
    assert [simulate_config(f"hardware={name}").hardware.name for name in names] == names
    assert {"llama3_8b", "llama3_70b", "llama3_405b", "qwen3_32b"} <= set(shape_names())


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("llama3_8b", 8.03, 131_072),
        ("llama3_70b", 70.6, 327_680),
        ("llama3_405b", 405.9, 516_096),
        ("qwen3_32b", 32.8, 262_144),
        ("qwen3_235b_a22b", 235.1, 192_512),
    ],
)
def test_a_shape_has_the_published_size(name: str, billions: float, kv_bytes: int) -> None:
    shape, mesh = find_shape(name), MeshConfig()

    assert weight_bytes(shape, mesh, (shape.num_layers,)) / 2e9 == pytest.approx(billions, rel=2e-3)
    assert shape.kv_bytes_per_token() == kv_bytes
