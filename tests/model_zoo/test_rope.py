"""Rotary angles are exact at millions of positions; every kind matches transformers."""

from __future__ import annotations

import dataclasses
import decimal
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.rope import (
    RopeSpec,
    inverse_frequencies,
    rotary_cos_sin,
)
from mnemosyne.model_zoo.rope_entries import read_rope
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.operators import TORCH
from tests.model_zoo.tiny import ROPES, tiny_checkpoint

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
LLAMA_3 = RopeSpec(theta=500_000.0, dim=128)
FAR = [9_999_999, 10_000_000, 10_485_759, 16_777_217]  # the last one has no float32


def exact_cos(position: int, theta: float, dim: int) -> list[float]:
    """Cosines of a position's angles, from 60 decimal digits."""
    with decimal.localcontext(prec=60):
        angles = (position * Decimal(theta) ** (Decimal(-2 * i) / dim) for i in range(dim // 2))
        return [float(_cos(angle % (2 * PI))) for angle in angles]


def _cos(angle: Decimal) -> Decimal:
    total = term = Decimal(1)
    for n in range(1, 40):
        term *= -angle * angle / ((2 * n - 1) * 2 * n)
        total += term
    return total


@pytest.mark.parametrize("position", FAR)
def test_far_angles_are_exact_to_the_rounding_of_float64(position: int) -> None:
    cos_TD, _ = rotary_cos_sin(torch.tensor([position]), LLAMA_3, torch.float64, TORCH)
    exact = torch.tensor(exact_cos(position, 500_000.0, 128), dtype=torch.float64)

    # The frequency and the product round once each, half an ulp of the angle at most; pow may
    # be one ulp off.
    budget = 2 * position * torch.finfo(torch.float64).eps
    assert (cos_TD[0] - exact).abs().max() <= budget < 1e-8


def test_far_cosines_in_float32_carry_only_their_own_rounding() -> None:
    cos_TD, sin_TD = rotary_cos_sin(torch.tensor(FAR), LLAMA_3, torch.bfloat16, TORCH)
    exact_TD = torch.tensor([exact_cos(p, 500_000.0, 128) for p in FAR], dtype=torch.float64)

    assert cos_TD.dtype == sin_TD.dtype == torch.float32
    assert (cos_TD - exact_TD).abs().max() <= torch.finfo(torch.float32).eps


def test_angles_formed_in_float32_are_wrong_far_out() -> None:
    exact = torch.tensor(exact_cos(10_485_759, 500_000.0, 128), dtype=torch.float64)

    narrow = torch.tensor(10_485_759.0) * inverse_frequencies(LLAMA_3).float()

    assert (narrow.cos() - exact).abs().max() > 0.1


YARNS: list[dict[str, Any]] = [
    {},
    {"factor": 4.0, "beta_fast": 16, "beta_slow": 2},
    {"truncate": False},
    {"attention_factor": 1.25},
    {"mscale": 0.7, "mscale_all_dim": 0.3},
    {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    {"mscale": 0.7},
    {"factor": None},
    {"factor": 1.0},
    {"rope_theta": 1_000_000.0, "original_max_position_embeddings": 32_768},
]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **ROPES["llama3"], "rope_theta": 500_000.0},
        {"rope_type": "llama3", **ROPES["llama3"], "original_max_position_embeddings": 8192},
        {"rope_type": "llama3", **ROPES["llama3"], "low_freq_factor": 1.5, "high_freq_factor": 9.0},
        *({"rope_type": "yarn", **ROPES["yarn"], **changes} for changes in YARNS),
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], head_dim: int) -> None:
    rope = {"rope_theta": 10_000.0, **rope}
    config = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=65_536, rope_parameters=dict(rope)
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)

    spec = read_rope(Config({"rope_parameters": rope}), head_dim, 65_536)

    # transformers rounds each of a handful of operations to float32.
    actual = inverse_frequencies(spec)
    torch.testing.assert_close(actual.float(), expected, rtol=1e-5, atol=0)
    assert spec.attention_factor == pytest.approx(attention_factor, rel=1e-15)


def test_yarn_multiplies_cos_and_sin() -> None:
    plain = RopeSpec(theta=10_000.0, dim=8)
    positions_T = torch.arange(5)

    louder = dataclasses.replace(plain, attention_factor=1.5)

    for gained, base in zip(
        rotary_cos_sin(positions_T, louder, torch.float64, TORCH),
        rotary_cos_sin(positions_T, plain, torch.float64, TORCH),
        strict=True,
    ):
        assert torch.equal(gained, 1.5 * base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rotated_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_THD = torch.randn(6, 2, 128, generator=generator).to(dtype)
    positions_T = torch.arange(6) + 10_000_000

    turned = TORCH.rotate(x_THD, *rotary_cos_sin(positions_T, LLAMA_3, dtype, TORCH))

    exact = TORCH.rotate(
        x_THD.double(), *rotary_cos_sin(positions_T, LLAMA_3, torch.float64, TORCH)
    )
    assert turned.dtype == dtype
    # Two float32 roundings cannot be told from none, but at a tie of the last one.
    error = (turned.double() - exact).abs()
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)).all()


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q_HD, k_HD = torch.randn(2, 1, 128, generator=generator, dtype=torch.float64)

    def score(q_position: int) -> float:
        positions_T = torch.tensor([q_position, q_position - 1000])
        rotary = rotary_cos_sin(positions_T, LLAMA_3, torch.float64, TORCH)
        q, k = TORCH.rotate(torch.stack((q_HD, k_HD)), *rotary)
        return float((q * k).sum())

    # Both angles of a pair round as in the first test; the score moves by at most their sum.
    budget = 4 * 10_000_000 * torch.finfo(torch.float64).eps * float(q_HD.norm() * k_HD.norm())
    assert score(10_000_000) == pytest.approx(score(1000), abs=budget)


def test_stretched_kinds_reach_the_stretched_length(tmp_path: Path) -> None:
    reach = {
        kind: read_spec(tiny_checkpoint(tmp_path / kind, rope=kind)).max_positions for kind in ROPES
    }

    assert reach == {"default": 1024, "linear": 2560, "llama3": 1024, "yarn": 1024}
