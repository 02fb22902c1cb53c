"""Claims about step times that outlive a process."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from mnemosyne.kept import write_kept
from mnemosyne.schedule.predictor import NUM_FEATURES
from mnemosyne.schedule.saved_fits import Steps, fits_folder, load_fit, save_fit

KEY = {"model": "bench", "hardware": "two cores", "dtype": "bfloat16"}
SHAPES = (((0, 32, False),), ((512, 1, True), (512, 64, False)))
STEPS = dict(
    zip(SHAPES, np.random.default_rng(0).uniform(1, 2, (2, NUM_FEATURES + 1)), strict=True)
)


def same(a: Steps, b: Steps) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[shape], b[shape]) for shape in a)


def test_what_was_saved_comes_back_bit_by_bit(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    save_fit(folder, KEY, STEPS)

    assert same(load_fit(folder, dict(reversed(KEY.items()))), STEPS)


@pytest.mark.parametrize("name", KEY)
def test_every_part_of_the_key_tells_fits_apart(tmp_path: Path, name: str) -> None:
    save_fit(tmp_path, KEY, STEPS)

    assert load_fit(tmp_path, {**KEY, name: "another"}) == {}


def test_a_file_under_the_name_of_another_key_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for model in ("a", "b"):
        save_fit(tmp_path / model, {"model": model}, STEPS)
    (a,), (b,) = (tmp_path / "a").iterdir(), (tmp_path / "b").iterdir()
    b.replace(tmp_path / "a" / a.name)

    assert load_fit(tmp_path / "a", {"model": "a"}) == {}
    assert "it is of another key" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}', "[" * 100_000, "\0", "é"])
def test_a_file_that_another_program_changed_is_told_and_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    save_fit(tmp_path, KEY, STEPS)
    (path,) = tmp_path.iterdir()
    path.write_text(text)

    assert load_fit(tmp_path, KEY) == {}
    assert "measured again" in caplog.text


def test_a_file_that_lost_its_end_or_a_digit_is_not_used(tmp_path: Path) -> None:
    save_fit(tmp_path, KEY, STEPS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    for content in (whole[:-1], whole[: len(whole) // 2], whole.replace(b"1", b"2", 1)):
        path.write_bytes(content)
        assert load_fit(tmp_path, KEY) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("column", [0, NUM_FEATURES])
def test_times_that_no_step_takes_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: float, column: int
) -> None:
    row = np.ones(NUM_FEATURES + 1)
    row[column] = value
    save_fit(tmp_path, KEY, {SHAPES[0]: row})

    assert load_fit(tmp_path, KEY) == {}
    assert "measured again" in caplog.text


@pytest.mark.parametrize(
    "content", [{}, {"key": KEY}, {"key": KEY, "steps": [1]}, {"key": KEY, "steps": 1}, []]
)
def test_a_file_of_another_version_is_not_used(tmp_path: Path, content: object) -> None:
    save_fit(tmp_path, KEY, STEPS)
    (path,) = tmp_path.iterdir()
    write_kept(path, json.dumps(content).encode())

    assert load_fit(tmp_path, KEY) == {}


def test_a_fit_with_fewer_features_is_told_and_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_fit(tmp_path, KEY, {shape: row[1:] for shape, row in STEPS.items()})

    assert load_fit(tmp_path, KEY) == {}
    assert "it is of another version" in caplog.text


def test_a_file_that_others_can_write_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_fit(tmp_path, KEY, STEPS)
    (path,) = tmp_path.iterdir()
    path.chmod(0o666)

    assert load_fit(tmp_path, KEY) == {}
    assert "other users can write to it" in caplog.text


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    caplog.set_level(logging.WARNING)

    save_fit(tmp_path / "file" / "fits", KEY, STEPS)

    assert "cannot be written" in caplog.text


def test_saving_leaves_one_file_whatever_stood_there(tmp_path: Path) -> None:
    doubled = {shape: 2 * row for shape, row in STEPS.items()}
    for steps in (STEPS, doubled):
        save_fit(tmp_path, KEY, steps)

    assert len(list(tmp_path.iterdir())) == 1
    assert same(load_fit(tmp_path, KEY), doubled)


def test_fits_stand_in_the_cache_folder_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    assert fits_folder() == tmp_path / "mnemosyne" / "fits"
