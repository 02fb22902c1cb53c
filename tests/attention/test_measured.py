"""On a GPU, auto takes what was measured there to be the faster, and says so."""

from __future__ import annotations

import logging

import pytest
import torch

from mnemosyne.attention import choose_backend
from mnemosyne.attention.measured import measured_backends, usual_on_gpu

TABLE = {
    "9.0": {"decode": "triton", "chunk": "triton"},
    "8.0": {"decode": "triton", "chunk": "flex"},
}


@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [
        ("9.0", torch.bfloat16, "triton"),
        ("9.0", torch.float32, "flex"),
        ("8.0", torch.bfloat16, "flex"),
        ("10.0", torch.bfloat16, "flex"),
        (None, torch.bfloat16, "flex"),
    ],
)
def test_a_backend_is_taken_where_it_won_decodes_and_chunks(
    capability: str | None, dtype: torch.dtype, name: str
) -> None:
    assert usual_on_gpu(TABLE, capability, dtype)[0] == name


def test_the_table_names_backends_alone() -> None:
    for row in measured_backends().values():
        assert row.keys() == {"decode", "chunk"}
        assert set(row.values()) <= {"flex", "triton"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU at hand may have been measured")
def test_auto_says_that_nothing_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    choose_backend("auto", device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=64)

    assert "attention is flex: nothing was measured on this device" in caplog.text
