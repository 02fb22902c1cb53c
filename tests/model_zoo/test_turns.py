"""Temperatures by position, exact to millions of them, and one table for each way to turn."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.model_zoo.family import Temperature
from mnemosyne.model_zoo.rope import RopeSpec, inverse_frequencies
from mnemosyne.model_zoo.turns import Turns, TurnTable, temperatures
from mnemosyne.operators import TORCH

POSITIONS = [0, 8190, 8191, 8192, 16_383, 10_485_759]
OTHER = RopeSpec(theta=100.0, dim=64)


@pytest.mark.parametrize("shift", [0, 1])
def test_temperature_rises_in_steps(shift: int) -> None:
    positions_T = torch.tensor(POSITIONS)

    found_T = temperatures(positions_T, Temperature(gain=0.1, span=8192, shift=shift))

    exact = [1 + 0.1 * math.log(1 + math.floor((p + shift) / 8192)) for p in POSITIONS]
    assert found_T.tolist() == pytest.approx(exact, rel=1e-15)


def test_layers_that_turn_alike_share_a_table() -> None:
    spec = replace(bench_spec(), ropes=(bench_spec().rope, None, OTHER, OTHER))

    table = TurnTable(spec, range(4))

    assert list(table.by_layer.values()) == [
        Turns(0, 0),
        Turns(None, None),
        Turns(1, 1),
        Turns(1, 1),
    ]
    assert len(table.tables(torch.arange(3), torch.float32, TORCH)) == 2


def test_queries_alone_take_the_temperature() -> None:
    spec = replace(bench_spec(), temperature=Temperature(gain=0.5, span=4))
    table = TurnTable(spec, range(1))

    at_q, at_k = table.by_layer[0]
    tables = table.tables(torch.tensor([0, 9]), torch.float64, TORCH)

    assert at_q is not None
    assert at_k is not None
    factor_T1 = torch.tensor([[1.0], [1 + 0.5 * math.log(3)]], dtype=torch.float64)
    for tempered, plain in zip(tables[at_q], tables[at_k], strict=True):
        torch.testing.assert_close(tempered, plain * factor_T1, rtol=1e-15, atol=0)


def test_equal_bounds_of_llama_leave_no_band_between() -> None:
    plain = RopeSpec(theta=500_000.0, dim=128)
    sharp = replace(
        plain,
        kind="llama3",
        factor=16.0,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=1.0,
    )

    ratio = inverse_frequencies(plain) / inverse_frequencies(sharp)

    turns = 8192 / (2 * math.pi) * inverse_frequencies(plain)
    assert torch.equal(ratio, torch.where(turns < 1, 16.0, 1.0).double())
