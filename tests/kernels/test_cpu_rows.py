"""The C++ operators on few rows: no worse than torch, whatever the strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.cpu import rows
from mnemosyne.kernels.cpu.library import what_is_missing
from mnemosyne.model_zoo.rope import rotate
from tests.attention.cases import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing()))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("shape", [(1, 1024), (7, 96), (3, 4, 64), (5, 2, 32)])
def test_the_norm_is_no_worse_than_torch(shape: tuple[int, ...]) -> None:
    width = shape[-1]
    x, weight = 3 * randn(*shape), randn(width)

    y = rows.rms_norm(x, weight, 1e-5)

    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert_no_worse_than_eager(y, F.rms_norm(x, (width,), weight, 1e-5), exact)


@pytest.mark.parametrize("shape", [(1, 16, 64), (7, 3, 128), (2, 1, 32)])
def test_a_rotation_is_no_worse_than_torch(shape: tuple[int, int, int]) -> None:
    x_THD, angle_TD = randn(*shape), randn(shape[0], shape[2] // 2).double()
    cos_TD, sin_TD = angle_TD.cos(), angle_TD.sin()

    y_THD = rows.rotate(x_THD, cos_TD.float(), sin_TD.float())

    first, second = x_THD.double().chunk(2, -1)
    cos, sin = cos_TD[:, None], sin_TD[:, None]
    exact_THD = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    repeats = rows.FEW_ROWS + 1  # as many rows as torch computes
    many_THD = x_THD.repeat(repeats, 1, 1)
    many_cos, many_sin = (t.float().repeat(repeats, 1) for t in (cos_TD, sin_TD))
    eager_THD = rotate(many_THD, many_cos, many_sin)
    assert_no_worse_than_eager(y_THD, eager_THD[: shape[0]], exact_THD)


def test_rows_may_lie_apart() -> None:
    x, weight, angle = randn(5, 4, 96), randn(64), randn(5, 32).float()

    assert torch.equal(
        rows.rms_norm(x[:, 1, :64], weight, 1e-6),
        rows.rms_norm(x[:, 1, :64].contiguous(), weight, 1e-6),
    )
    heads = x.flatten(1)[:, :256].unflatten(1, (4, 64))
    assert torch.equal(
        rows.rotate(heads, angle.cos(), angle.sin()),
        rows.rotate(heads.contiguous(), angle.cos(), angle.sin()),
    )


def test_rows_of_a_table_are_looked_up() -> None:
    table, ids = randn(10, 96), torch.tensor([9, 0, 9, 4])

    assert torch.equal(rows.look_up(table, ids), table[ids])


@pytest.mark.parametrize("gain", [1.0, 1.2])
def test_angles_are_exact_at_far_positions(gain: float) -> None:
    positions_T = torch.tensor([0, 1, 16_384, 10_485_759, (1 << 31) + 1])
    radians_D = 500_000.0 ** (torch.arange(32, dtype=torch.float64) / -32)

    cos_TD, sin_TD = rows.cos_sin(positions_T, radians_D, gain)

    angle_TD = positions_T.double()[:, None] * radians_D
    for actual, exact in ((cos_TD, angle_TD.cos() * gain), (sin_TD, angle_TD.sin() * gain)):
        assert actual.dtype == torch.float32
        assert (
            (actual.double() - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()
        ).all()


def test_a_sum_has_the_bits_of_torch() -> None:
    a, b = randn(7, 96), 3 * randn(96, 7).T.contiguous()

    assert torch.equal(rows.add(a, b), a + b)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    kv = randn(3, 2, 2, 64)  # as one product gives them: rows lie apart
    k_TKD, v_TKD = kv[:, 0], kv[:, 1]
    k_KSD, v_KSD = randn(2, 16, 64), randn(2, 16, 64) + 1
    slots_T = torch.tensor([15, 0, 7])
    expected = [
        pool.index_copy(1, slots_T, x.transpose(0, 1))
        for pool, x in ((k_KSD, k_TKD), (v_KSD, v_TKD))
    ]

    rows.write(k_TKD, v_TKD, slots_T, k_KSD, v_KSD)

    assert torch.equal(k_KSD, expected[0])
    assert torch.equal(v_KSD, expected[1])


def test_what_they_cannot_or_need_not_do_is_left_to_torch() -> None:
    x = randn(4, 8, 64)

    assert rows.is_fast_for(x)
    assert rows.is_fast_for(x[:, :3])
    assert not rows.is_fast_for(x.float())
    assert not rows.is_fast_for(x[..., :48])
    assert not rows.is_fast_for(x.transpose(1, 2))
    assert not rows.is_fast_for(x.repeat(17, 1, 1))
