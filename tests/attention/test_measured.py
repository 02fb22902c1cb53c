"""On a GPU, auto takes what was measured there to be the faster, and says so."""

from __future__ import annotations

import logging
from dataclasses import asdict

import pytest
import torch

from mnemosyne import attention
from mnemosyne.attention import ByKind, FlexBackend, choose_backend
from mnemosyne.attention.measured import measured_on, read_table, usual_on_gpu
from mnemosyne.attention.triton import TritonBackend
from mnemosyne.kernels.configs import configs_for, shape_key
from mnemosyne.kernels.tile import TileConfig

CUDA = torch.device("cuda")
FASTEST = TileConfig(16, 32, 2, 3)
ROW = {
    "decode": "triton",
    "chunk": "flex",
    "configs": {shape_key("decode", 64, 16): asdict(FASTEST)},
}


@pytest.mark.parametrize(
    ("row", "dtype", "kinds"),
    [
        (ROW, torch.bfloat16, {"decode": "triton", "chunk": "flex"}),
        (ROW, torch.float32, {"decode": "triton", "chunk": "triton"}),
        (None, torch.bfloat16, {"decode": "triton", "chunk": "triton"}),
    ],
)
def test_a_backend_is_taken_for_the_kind_that_it_won(
    row: dict[str, object] | None, dtype: torch.dtype, kinds: dict[str, str]
) -> None:
    assert usual_on_gpu(row, dtype)[0] == kinds


def test_auto_goes_by_the_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(attention, "measured_on", lambda device: ROW)

    backend = choose_backend("auto", device=CUDA, dtype=torch.bfloat16, head_dim=64)

    assert isinstance(backend, ByKind)
    assert backend.name == "triton+flex"
    assert isinstance(backend.decode, TritonBackend)
    assert isinstance(backend.chunk, FlexBackend)
    assert "attention is triton for decodes, flex for chunks" in caplog.text


def test_the_fastest_config_of_a_shape_is_used_in_half_precision_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "measured_on", lambda device: ROW)
    backend = choose_backend("triton", device=CUDA, dtype=torch.bfloat16, head_dim=64)
    assert isinstance(backend, TritonBackend)

    keys = torch.zeros(1, 16, 64, dtype=torch.bfloat16)

    assert backend.config("decode", keys, 16) == FASTEST
    for kind, like, page_size in (
        ("chunk", keys, 16),
        ("decode", keys, 32),
        ("decode", keys[..., :32], 16),
        ("decode", keys.float(), 16),
    ):
        usual = configs_for(kind, like.dtype, like.shape[-1], page_size, None)[0]
        assert backend.config(kind, like, page_size) == usual != FASTEST


def test_the_table_names_backends_and_configs_alone() -> None:
    for row in read_table().values():
        assert "configs" in row.keys() <= {"decode", "chunk", "configs"}
        assert {row.get("decode", "triton"), row.get("chunk", "triton")} <= {"flex", "triton"}
        for fields in row["configs"].values():
            TileConfig(**fields)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU at hand may have been measured")
def test_auto_says_that_nothing_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    backend = choose_backend("auto", device=CUDA, dtype=torch.bfloat16, head_dim=64)

    assert measured_on(CUDA) is None
    assert backend.name == "triton"
    assert (
        "triton for decodes, triton for chunks: backends were not compared on this device"
        in caplog.text
    )
