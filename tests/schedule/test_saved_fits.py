"""Claims about step times that outlive a process."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from mnemosyne.schedule.predictor import NUM_FEATURES, LinearPredictor
from mnemosyne.schedule.saved_fits import fits_folder, load_fit, save_fit

KEY = {"model": "bench", "hardware": "two cores", "dtype": "bfloat16"}
ROWS = np.random.default_rng(0).uniform(1, 2, (5, NUM_FEATURES + 1))


def test_what_was_saved_comes_back_bit_by_bit(tmp_path: Path) -> None:
    save_fit(tmp_path / "made", KEY, ROWS)

    assert np.array_equal(load_fit(tmp_path / "made", dict(reversed(KEY.items()))), ROWS)


@pytest.mark.parametrize("name", KEY)
def test_every_part_of_the_key_tells_fits_apart(tmp_path: Path, name: str) -> None:
    save_fit(tmp_path, KEY, ROWS)

    assert load_fit(tmp_path, {**KEY, name: "another"}) is None


def test_a_predictor_predicts_the_same_from_its_saved_samples(tmp_path: Path) -> None:
    first, second = LinearPredictor(), LinearPredictor()
    first.fit_rows(ROWS)
    save_fit(tmp_path, KEY, first.samples)

    second.fit_rows(load_fit(tmp_path, KEY))

    assert second.coefficients == first.coefficients


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 3}', '{"rows": [[1, 2]]}'])
def test_a_file_that_is_no_fit_is_told_and_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    save_fit(tmp_path, KEY, ROWS)
    (path,) = tmp_path.iterdir()
    path.write_text(text)

    assert load_fit(tmp_path, KEY) is None
    assert "measured again" in caplog.text


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    caplog.set_level(logging.WARNING)

    save_fit(tmp_path / "file" / "fits", KEY, ROWS)

    assert "cannot be written" in caplog.text


def test_saving_leaves_one_file_whatever_stood_there(tmp_path: Path) -> None:
    for scale in (1.0, 2.0):
        save_fit(tmp_path, KEY, scale * ROWS)

    assert len(list(tmp_path.iterdir())) == 1
    assert np.array_equal(load_fit(tmp_path, KEY), 2.0 * ROWS)


def test_fits_stand_in_the_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")

    assert fits_folder() == Path("/somewhere/mnemosyne/fits")
