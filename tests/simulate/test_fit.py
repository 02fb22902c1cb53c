"""Efficiencies are found again from the steps that a machine with them took."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mnemosyne import cli
from mnemosyne.cli.shapes import find_shape
from mnemosyne.config_simulate import EfficiencyConfig
from mnemosyne.joining.simulated import build_simulation
from mnemosyne.metrics import StepLog, StepRecord
from mnemosyne.simulate.fit import fit_efficiency
from mnemosyne.simulate.workload import Arrival
from tests.simulate.machines import simulate_config

TRUE = EfficiencyConfig(
    gemm=0.6,
    attention=0.3,
    weights=0.7,
    kv=0.5,
    links=0.8,
    node_latency=0.0,
    network_latency=0.0,
    layer_overhead="1ms",
    step_overhead="2ms",
)


def _steps() -> list[StepRecord]:
    """Steps of the yardstick on a machine with ``TRUE``: prompts alone, mixed, decodes alone."""
    config = replace(
        simulate_config("hardware=cpu_2core", "schedule.target_tbt=0.2"), efficiency=TRUE
    )
    records: list[StepRecord] = []
    simulation = build_simulation(config, find_shape("bench"), on_step=records.append)
    arrivals = [Arrival(2.0 * i, 200 * (i + 1) ** 2, 40) for i in range(8)]
    simulation.run(arrivals)
    return records


def test_a_fit_finds_the_constants_of_the_machine() -> None:
    config = simulate_config("hardware=cpu_2core")

    fit = fit_efficiency(_steps(), find_shape("bench"), config.hardware, config.efficiency)

    found = fit.efficiency
    assert fit.error_p95 < 0.01
    assert found.gemm == pytest.approx(0.6, rel=0.02)
    assert found.attention == pytest.approx(0.3, rel=0.02)
    assert found.kv == pytest.approx(0.5, rel=0.05)
    assert found.links == config.efficiency.links, "one rank sends nothing"


def test_a_hiccup_of_the_machine_spoils_no_fit() -> None:
    rng = np.random.default_rng(0)
    records = [
        replace(record, actual_s=record.actual_s * (5.0 if rng.random() < 0.05 else 1.0))
        for record in _steps()
    ]
    config = simulate_config("hardware=cpu_2core")

    fit = fit_efficiency(records, find_shape("bench"), config.hardware, config.efficiency)

    assert fit.error_p50 < 0.01
    assert fit.efficiency.attention == pytest.approx(0.3, rel=0.02)


def test_a_record_calibrates_a_simulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.jsonl"
    with StepLog(path) as log:
        for record in _steps():
            log.write(record)
    words = ["model=bench", "hardware=cpu_2core", "workload.num_requests=3"]

    status = cli.main(["simulate", *words, f"calibration={path}", "workload.long_share=0"])

    assert status == cli.OK
    assert "efficiency.gemm=0.6 efficiency.attention=0.3 " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (None, "calibration must be a file that metrics.path wrote, got"),
        (0, "calibration must hold at least 20 steps, got 0"),
    ],
)
def test_a_record_that_says_nothing_is_refused(
    lines: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "steps.jsonl"
    if lines is not None:
        path.write_text("")

    status = cli.main(["simulate", "model=bench", f"calibration={path}"])

    assert status == cli.FAILED
    assert said in capsys.readouterr().err
