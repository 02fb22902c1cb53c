"""End tokens and sampling defaults of a checkpoint, and how they fill a request."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mnemosyne.request import SamplingParams
from mnemosyne.serve.defaults import GenerationDefaults


def write(path: Path, generation: object = None, config: object = None) -> Path:
    for name, content in (("generation_config", generation), ("config", config)):
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        ({"eos_token_id": 7}, {"eos_token_id": 1}, (7, 1)),
        ({"eos_token_id": [7, 9]}, {"eos_token_id": [9, 2]}, (7, 9, 2)),
        ({"eos_token_id": [7, 9]}, None, (7, 9)),
        ({"do_sample": True}, {"eos_token_id": [1, 2]}, (1, 2)),
        (None, {"eos_token_id": 0}, (0,)),
        ({"eos_token_id": None}, {"eos_token_id": None}, ()),
    ],
)
def test_the_end_tokens_of_either_file_end_a_text(
    tmp_path: Path, generation: object, config: object, expected: tuple[int, ...]
) -> None:
    defaults = GenerationDefaults.from_dir(write(tmp_path, generation, config))

    assert defaults.end_token_ids == expected


def test_a_checkpoint_that_samples_fills_what_is_unset(tmp_path: Path) -> None:
    values = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05}
    defaults = GenerationDefaults.from_dir(write(tmp_path, {"do_sample": True, **values}))

    params = defaults.resolve(SamplingParams(top_p=0.5, max_tokens=7))

    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.5, 20)
    assert (params.repetition_penalty, params.max_tokens) == (1.05, 7)


@pytest.mark.parametrize("generation", [None, {}, {"temperature": 0.6}, {"do_sample": False}])
def test_greedy_unless_the_checkpoint_samples(tmp_path: Path, generation: object) -> None:
    defaults = GenerationDefaults.from_dir(write(tmp_path, generation))

    params = defaults.resolve(SamplingParams())

    assert (params.temperature, params.top_p, params.top_k) == (0.0, 1.0, 0)
    assert params.repetition_penalty == 1.0


def test_sampling_without_a_temperature_means_one(tmp_path: Path) -> None:
    defaults = GenerationDefaults.from_dir(write(tmp_path, {"do_sample": True}))

    assert defaults.resolve(SamplingParams()).temperature == 1.0


def test_values_of_the_request_win(tmp_path: Path) -> None:
    defaults = GenerationDefaults.from_dir(write(tmp_path, {"do_sample": True, "temperature": 2.0}))
    asked = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0, seed=5)

    assert defaults.resolve(asked) == asked


@pytest.mark.parametrize(
    ("generation", "says"),
    [
        ({"eos_token_id": "2"}, "eos_token_id in .* must be a token id or a list"),
        ({"eos_token_id": [2, -1]}, "eos_token_id in .* must be a token id or a list"),
        ({"eos_token_id": True}, "eos_token_id in .* must be a token id or a list"),
        ({"temperature": -1}, "temperature in .* must be a number"),
        ({"temperature": float("nan")}, "temperature in .* must be finite"),
        ({"temperature": float("inf")}, "temperature in .* must be finite"),
        ({"top_p": 0}, "top_p in .* must be above 0"),
        ({"top_p": 1.5}, "top_p in .* must be a number in"),
        ({"top_k": 2.5}, "top_k in .* must be a whole number"),
        ({"top_k": -1}, "top_k in .* must be a number in"),
        ({"repetition_penalty": 0}, "repetition_penalty in .* must be above 0"),
        ({"do_sample": "yes"}, "do_sample in .* must be true or false"),
        ([1, 2], "generation_config.json must hold a JSON object"),
    ],
)
def test_malformed_values_are_named(tmp_path: Path, generation: object, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GenerationDefaults.from_dir(write(tmp_path, generation))


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")

    with pytest.raises(ValueError, match=r"generation_config\.json must be valid JSON"):
        GenerationDefaults.from_dir(tmp_path)
