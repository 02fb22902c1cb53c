"""Every family computes what transformers computes, and refuses by name what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mnemosyne.model_zoo.spec import read_spec
from tests.model_zoo.families import FAMILIES, tiny_family
from tests.model_zoo.test_decoder import dense_logits, load, prompt
from tests.model_zoo.wide import EXACT, wide_logits


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    path = tiny_family(tmp_path, name)
    ids = prompt(200)

    actual = dense_logits(load(path), ids)

    expected = wide_logits(path, ids)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.dtype == expected.dtype == torch.float64
    assert error < EXACT, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", FAMILIES)
def test_chunks_do_not_change_the_logits(tmp_path: Path, name: str) -> None:
    decoder = load(tiny_family(tmp_path, name))
    ids = prompt(40)

    whole, parts = dense_logits(decoder, ids), dense_logits(decoder, ids, chunk=7)

    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-11)
    assert read_spec(tmp_path) == decoder.spec
