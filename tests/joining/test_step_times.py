"""Measurements of earlier starts are used where they hold, extended where they end, else remade."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mnemosyne import machine
from mnemosyne.config import CacheConfig, EngineConfig, ScheduleConfig
from mnemosyne.joining import step_times
from mnemosyne.joining.rank import build_rank
from mnemosyne.joining.real import fit_key
from mnemosyne.joining.step_times import describe_machine, fit_step_times, still_holds
from mnemosyne.schedule.calibrate import Limits
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.saved_fits import load_fit
from mnemosyne.schedule.work import StepWork
from tests.model_zoo.tiny import tiny_checkpoint
from tests.schedule.test_calibrate import COSTS, ROOMY, WORK_MODEL, Machine, seconds_of

KEY = {"model": "tiny", "hardware": "a clock"}
LARGE = WORK_MODEL.chunk(32768, 512, samples=False, is_decode=False)


@pytest.fixture(autouse=True)
def machine_clock(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    """Starts run on machines whose clock is their own; the newest is last."""
    machines = [Machine()]
    monkeypatch.setattr(step_times, "perf_counter", lambda: machines[-1].now_s)
    return machines


def start(machines: list[Machine], limits: Limits, **key: str) -> tuple[LinearPredictor, int]:
    """One start on a machine of its own: what it predicts with, and how many steps it timed."""
    machines.append(Machine())
    predictor = LinearPredictor()
    fit_step_times(predictor, machines[-1], WORK_MODEL, limits, {**KEY, **key}, is_kept=True)
    return predictor, len(machines[-1].plans)


@pytest.mark.parametrize(
    "less", [{"num_pages": 256}, {"num_pages": 1024}, {"step_s": 0.01}, {"max_positions": 4096}]
)
def test_a_start_that_reaches_further_measures_only_what_is_missing(
    machine_clock: list[Machine], less: dict[str, float]
) -> None:
    fresh, num_all = start(machine_clock, ROOMY, model="another")
    start(machine_clock, replace(ROOMY, **less))

    extended, num_missing = start(machine_clock, ROOMY)
    again, num_probes = start(machine_clock, ROOMY)

    assert 0 < num_probes < num_missing < num_all
    for predictor in (fresh, extended, again):
        assert predictor.predict(LARGE) == pytest.approx(seconds_of(LARGE), rel=1e-3)
    # an extended fit is what one sweep would have found
    assert extended.coefficients == again.coefficients


@pytest.mark.parametrize("less", [{"num_pages": 256}, {"step_s": 0.01}, {"max_positions": 4096}])
def test_a_start_that_reaches_less_far_uses_all_that_is_known(
    machine_clock: list[Machine], less: dict[str, float]
) -> None:
    first, num_all = start(machine_clock, ROOMY)

    second, num_probes = start(machine_clock, replace(ROOMY, **less))

    assert num_probes < num_all / 4
    assert second.coefficients == first.coefficients


def test_a_fit_of_a_machine_that_became_slower_is_made_again(
    machine_clock: list[Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    start(machine_clock, ROOMY)
    monkeypatch.setattr("tests.schedule.test_calibrate.COSTS", 5 * COSTS)

    predictor, _ = start(machine_clock, ROOMY)

    assert predictor.predict(LARGE) == pytest.approx(seconds_of(LARGE), rel=1e-3)


@pytest.mark.parametrize(("factor", "holds"), [(1.0, True), (5.0, False), (0.1, False)])
def test_a_fit_holds_within_a_factor_of_two(factor: float, holds: bool) -> None:
    predictor = LinearPredictor()
    works = [StepWork(num_tokens=tokens, num_sequences=1) for tokens in (1, 100, 1000)]
    predictor.fit([(work, 1e-3 * work.num_tokens) for work in works])

    assert still_holds(predictor, [(works[1], factor * 0.1)]) is holds


def test_a_fit_that_misses_its_own_sweep_is_said_and_not_kept(
    machine_clock: list[Machine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(step_times, "fit_error", lambda predictor, samples: 0.6)

    (_, first), (_, second) = start(machine_clock, ROOMY), start(machine_clock, ROOMY)

    assert first == second
    assert caplog.text.count("median error 60%") == 2
    assert load_fit(step_times.fits_folder(), KEY) == {}


def test_nothing_is_read_or_kept_where_that_is_turned_off(machine_clock: list[Machine]) -> None:
    start(machine_clock, ROOMY)
    kept = load_fit(step_times.fits_folder(), KEY)
    machine_clock.append(Machine())

    fit_step_times(LinearPredictor(), machine_clock[-1], WORK_MODEL, ROOMY, KEY, is_kept=False)

    assert len(machine_clock[-1].plans) > len(kept)


def test_what_an_earlier_start_knew_is_said(
    machine_clock: list[Machine], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mnemosyne")
    for limits in (replace(ROOMY, step_s=0.02), ROOMY, ROOMY):
        start(machine_clock, limits)

    said = [record.getMessage().rpartition(" in ")[0] for record in caplog.records]
    assert said == [
        "step times fitted from 15 steps (15 new)",
        "step times fitted from 16 steps (1 new)",
        "step times of an earlier start,",
    ]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("key")
    return (
        tiny_checkpoint(folder / "a", family="mistral", window=24),
        tiny_checkpoint(folder / "b", family="llama"),
    )


def key(model: Path, **changes: object) -> dict[str, str]:
    config = EngineConfig(
        model=str(model),
        device="cpu",
        schedule=ScheduleConfig(chunk="adaptive"),
        cache=CacheConfig(max_tokens=1024, page_size=changes.pop("page_size", 16)),
    )
    mesh = changes.pop("mesh", {})
    for name, value in changes.items():
        setattr(config, name, value)
    rank = build_rank(config)
    for name, value in mesh.items():
        setattr(config.mesh, name, value)
    return fit_key(config, rank)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float32"},
        {"attention": "reference"},
        {"compile": "none"},
        {"page_size": 32},
        {"mesh": {"tp": 2}},
        {"mesh": {"kvp": 2}},
        {"mesh": {"pp": 2}},
        {"mesh": {"ffn": "wide"}},
    ],
)
def test_a_choice_that_changes_step_times_changes_the_key(
    checkpoints: tuple[Path, Path], change: dict[str, object]
) -> None:
    model, _ = checkpoints

    assert key(model, **change) != key(model)


def test_another_model_changes_the_key_and_another_cache_does_not(
    checkpoints: tuple[Path, Path],
) -> None:
    model, other = checkpoints
    usual = key(model)

    assert key(other) != usual
    assert key(model, cache=CacheConfig(max_tokens=512, page_size=16)) == usual


def test_another_machine_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    usual = describe_machine(cpu)
    for place, name, value in (
        (step_times, "processor_name", lambda: "Abacus 1"),
        (step_times, "instructions", lambda: machine.instructions()[1:]),
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "1.2.3"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            assert describe_machine(cpu) != usual
