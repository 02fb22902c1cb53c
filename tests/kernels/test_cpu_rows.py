"""The C++ operators on rows: no worse than torch, whatever the strides, the same in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.cpu import rows
from mnemosyne.kernels.cpu.processor import AVX512
from tests.attention.cases import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not()))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("shape", [(1, 1024), (7, 96), (70, 1024), (3, 4, 64), (5, 2, 32)])
def test_the_norm_is_no_worse_than_torch(shape: tuple[int, ...]) -> None:
    width = shape[-1]
    x, weight = 3 * randn(*shape), randn(width)

    y = rows.rms_norm(x, weight, 1e-5, AVX512)

    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert_no_worse_than_eager(y, F.rms_norm(x, (width,), weight, 1e-5), exact)


@pytest.mark.parametrize("shape", [(1, 16, 64), (7, 3, 128), (2, 1, 32), (70, 16, 64)])
def test_a_rotation_is_no_worse_than_torch(shape: tuple[int, int, int]) -> None:
    x_THD, angle_TD = randn(*shape), randn(shape[0], shape[2] // 2).double()
    cos_TD, sin_TD = angle_TD.cos(), angle_TD.sin()

    y_THD = rows.rotate(x_THD, cos_TD.float(), sin_TD.float(), AVX512)

    def plain(x_THD: Tensor, dtype: torch.dtype) -> Tensor:
        first, second = x_THD.chunk(2, -1)
        cos, sin = cos_TD[:, None].to(dtype), sin_TD[:, None].to(dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    eager_THD = plain(x_THD, torch.float32).bfloat16()
    assert_no_worse_than_eager(y_THD, eager_THD, plain(x_THD.double(), torch.float64))


def test_rows_may_lie_apart() -> None:
    x, weight, angle = randn(5, 4, 96), randn(64), randn(5, 32).float()

    assert torch.equal(
        rows.rms_norm(x[:, 1, :64], weight, 1e-6, AVX512),
        rows.rms_norm(x[:, 1, :64].contiguous(), weight, 1e-6, AVX512),
    )
    heads = x.flatten(1)[:, :256].unflatten(1, (4, 64))
    assert torch.equal(
        rows.rotate(heads, angle.cos(), angle.sin(), AVX512),
        rows.rotate(heads.contiguous(), angle.cos(), angle.sin(), AVX512),
    )


def test_rows_of_a_table_are_looked_up() -> None:
    table, ids = randn(10, 96), torch.tensor([9, 0, 9, 4])

    assert torch.equal(rows.look_up(table, ids, AVX512), table[ids])


@pytest.mark.parametrize("gain", [1.0, 1.2])
def test_angles_are_exact_at_far_positions(gain: float) -> None:
    positions_T = torch.tensor([0, 1, 16_384, 10_485_759, (1 << 31) + 1])
    radians_D = 500_000.0 ** (torch.arange(32, dtype=torch.float64) / -32)

    cos_TD, sin_TD = rows.cos_sin(positions_T, radians_D, gain, AVX512)

    angle_TD = positions_T.double()[:, None] * radians_D
    for actual, exact in ((cos_TD, angle_TD.cos() * gain), (sin_TD, angle_TD.sin() * gain)):
        assert actual.dtype == torch.float32
        assert (
            (actual.double() - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()
        ).all()


def test_a_sum_has_the_bits_of_torch() -> None:
    a, b = randn(7, 96), 3 * randn(96, 7).T.contiguous()

    assert torch.equal(rows.add(a, b, AVX512), a + b)


def test_keys_and_values_go_to_their_slots_and_nowhere_else() -> None:
    kv = randn(3, 2, 2, 64)  # as one product gives them: rows lie apart
    k_TKD, v_TKD = kv[:, 0], kv[:, 1]
    k_KSD, v_KSD = randn(2, 16, 64), randn(2, 16, 64) + 1
    slots_T = torch.tensor([15, 0, 7])
    expected = [
        pool.index_copy(1, slots_T, x.transpose(0, 1))
        for pool, x in ((k_KSD, k_TKD), (v_KSD, v_TKD))
    ]

    rows.write(k_TKD, v_TKD, slots_T, k_KSD, v_KSD, AVX512)

    assert torch.equal(k_KSD, expected[0])
    assert torch.equal(v_KSD, expected[1])


MOST_ROWS = 200
WIDTH, NUM_HEADS, HEAD_DIM = 1024, 16, 64  # of these, 64 rows are the most that one thread takes


def everything(all_x: Tensor, weight: Tensor, row: int, num_rows: int) -> Sequence[Tensor]:
    """What every kernel gives for some rows of the same input."""
    chosen = slice(row, row + num_rows)
    x, y = all_x[chosen], all_x.flip(0)[chosen]
    heads = x.unflatten(1, (NUM_HEADS, HEAD_DIM))
    positions_T = 10_000_000 + torch.arange(MOST_ROWS)[chosen]
    radians_D = 500_000.0 ** (torch.arange(HEAD_DIM // 2, dtype=torch.float64) / -32)
    cos_TD, sin_TD = rows.cos_sin(positions_T, radians_D, 1.0, AVX512)
    k_KSD, v_KSD = (torch.zeros(NUM_HEADS, MOST_ROWS, HEAD_DIM).bfloat16() for _ in range(2))
    rows.write(heads, y.view(heads.shape), torch.arange(MOST_ROWS)[chosen], k_KSD, v_KSD, AVX512)
    return (
        rows.look_up(all_x, positions_T % 50, AVX512),
        cos_TD,
        sin_TD,
        rows.rms_norm(x, weight, 1e-5, AVX512),
        rows.rms_norm(heads, weight[:HEAD_DIM], 1e-5, AVX512),
        rows.rotate(heads, cos_TD, sin_TD, AVX512),
        rows.add(x, y, AVX512),
        k_KSD[:, chosen].transpose(0, 1),
        v_KSD[:, chosen].transpose(0, 1),
    )


def test_a_row_has_the_same_bits_in_a_chunk_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = randn(MOST_ROWS, WIDTH), randn(WIDTH)
    together = everything(*data, 0, MOST_ROWS)

    for num_rows in range(1, MOST_ROWS):
        row = (37 * num_rows) % (MOST_ROWS - num_rows + 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_rows: 1 + n % 2)
        for part, whole in zip(everything(*data, row, num_rows), together, strict=True):
            assert torch.equal(part, whole[row : row + num_rows])


def test_more_rows_than_64_take_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    launch: Callable[..., None] = rows.launch
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def noted(kernel: object, arguments: rows._Sum) -> None:
        found.append(arguments.num_threads)
        launch(kernel, arguments)

    monkeypatch.setattr(rows, "launch", noted)
    for num_rows in (1, 64, 65):
        rows.add(randn(num_rows, WIDTH), randn(num_rows, WIDTH), AVX512)

    assert found == [1, 1, 3]
