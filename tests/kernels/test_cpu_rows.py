"""The C++ operators on rows: no worse than torch, whatever the strides, the same in any company."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.cpu import rows
from tests.attention.cases import assert_no_worse_than_eager
from tests.kernels import sets
from tests.kernels.sets import Kernels


@pytest.fixture(params=sets.ALL, ids=str)
def by(request: pytest.FixtureRequest) -> Kernels:
    """Name what computes."""
    return sets.runnable(request.param)


def randn(by: Kernels, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(by.dtype)


@pytest.mark.parametrize("shape", [(1, 1024), (7, 96), (70, 1024), (3, 4, 64), (5, 2, 32)])
def test_the_norm_is_no_worse_than_torch(by: Kernels, shape: tuple[int, ...]) -> None:
    width = shape[-1]
    x, weight = 3 * randn(by, *shape), randn(by, width)

    y = rows.rms_norm(x, weight, 1e-5, by.instructions)

    exact = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert_no_worse_than_eager(y, F.rms_norm(x, (width,), weight, 1e-5), exact)


def test_logits_of_a_router_depend_on_their_row_alone(by: Kernels) -> None:
    x_TE, weight_XE = randn(by, 33, 256), randn(by, 7, 256)

    together = rows.route(x_TE, weight_XE, by.instructions)

    exact = x_TE.double() @ weight_XE.double().t()
    assert together.dtype == torch.float32
    assert (together - exact).abs().max() < 1e-4
    for start, stop in ((0, 1), (3, 8), (32, 33)):
        alone = rows.route(x_TE[start:stop], weight_XE, by.instructions)
        assert torch.equal(alone, together[start:stop])


def test_an_offset_is_added_to_the_weight_before_it_is_rounded(by: Kernels) -> None:
    x, weight = 3 * randn(by, 7, 96), 1e-3 * randn(by, 96)

    y = rows.rms_norm(x, weight, 1e-5, by.instructions, 1.0)

    exact = F.rms_norm(x.double(), (96,), weight.double() + 1, 1e-5)
    wide = F.rms_norm(x.float(), (96,), weight.float() + 1, 1e-5).to(by.dtype)
    assert_no_worse_than_eager(y, wide, exact)


@pytest.mark.parametrize("shape", [(1, 16, 64), (7, 3, 128), (2, 1, 32), (70, 16, 64)])
def test_a_rotation_is_no_worse_than_torch(by: Kernels, shape: tuple[int, int, int]) -> None:
    x_THD, angle_TD = randn(by, *shape), randn(by, shape[0], shape[2] // 2).double()
    cos_TD, sin_TD = angle_TD.cos(), angle_TD.sin()

    y_THD = rows.rotate(x_THD, cos_TD.float(), sin_TD.float(), by.instructions)

    def plain(x_THD: Tensor, dtype: torch.dtype) -> Tensor:
        first, second = x_THD.chunk(2, -1)
        cos, sin = cos_TD[:, None].to(dtype), sin_TD[:, None].to(dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    eager_THD = plain(x_THD.float(), torch.float32).to(by.dtype)
    assert_no_worse_than_eager(y_THD, eager_THD, plain(x_THD.double(), torch.float64))


def test_rows_may_lie_apart(by: Kernels) -> None:
    x, weight, angle = randn(by, 5, 4, 96), randn(by, 64), randn(by, 5, 32).float()

    assert torch.equal(
        rows.rms_norm(x[:, 1, :64], weight, 1e-6, by.instructions),
        rows.rms_norm(x[:, 1, :64].contiguous(), weight, 1e-6, by.instructions),
    )
    heads = x.flatten(1)[:, :256].unflatten(1, (4, 64))
    assert torch.equal(
        rows.rotate(heads, angle.cos(), angle.sin(), by.instructions),
        rows.rotate(heads.contiguous(), angle.cos(), angle.sin(), by.instructions),
    )


def test_rows_of_a_table_are_looked_up(by: Kernels) -> None:
    table, ids = randn(by, 10, 96), torch.tensor([9, 0, 9, 4])

    assert torch.equal(rows.look_up(table, ids, by.instructions), table[ids])


@pytest.mark.parametrize("gain", [1.0, 1.2])
def test_angles_are_exact_at_far_positions(by: Kernels, gain: float) -> None:
    positions_T = torch.tensor([0, 1, 16_384, 10_485_759, (1 << 31) + 1])
    radians_D = 500_000.0 ** (torch.arange(32, dtype=torch.float64) / -32)

    cos_TD, sin_TD = rows.cos_sin(positions_T, radians_D, gain, by.instructions)

    angle_TD = positions_T.double()[:, None] * radians_D
    for actual, exact in ((cos_TD, angle_TD.cos() * gain), (sin_TD, angle_TD.sin() * gain)):
        assert actual.dtype == torch.float32
        assert (
            (actual.double() - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()
        ).all()


def test_a_sum_has_the_bits_of_torch(by: Kernels) -> None:
    a, b = randn(by, 7, 96), 3 * randn(by, 96, 7).T.contiguous()

    assert torch.equal(rows.add(a, b, by.instructions), a + b)


def test_keys_and_values_go_to_their_slots_and_nowhere_else(by: Kernels) -> None:
    kv = randn(by, 3, 2, 2, 64)  # as one product gives them: rows lie apart
    k_TKD, v_TKD = kv[:, 0], kv[:, 1]
    k_KSD, v_KSD = randn(by, 2, 16, 64), randn(by, 2, 16, 64) + 1
    slots_T = torch.tensor([15, 0, 7])
    expected = [
        pool.index_copy(1, slots_T, x.transpose(0, 1))
        for pool, x in ((k_KSD, k_TKD), (v_KSD, v_TKD))
    ]

    rows.write(k_TKD, v_TKD, slots_T, k_KSD, v_KSD, by.instructions)

    assert torch.equal(k_KSD, expected[0])
    assert torch.equal(v_KSD, expected[1])


MOST_ROWS = 200
WIDTH, NUM_HEADS, HEAD_DIM = 1024, 16, 64  # of these, 64 rows are the most that one thread takes


def everything(
    by: Kernels, all_x: Tensor, weight: Tensor, row: int, num_rows: int
) -> Sequence[Tensor]:
    """Run every kernel on some rows of the same input."""
    chosen = slice(row, row + num_rows)
    x, y = all_x[chosen], all_x.flip(0)[chosen]
    heads = x.unflatten(1, (NUM_HEADS, HEAD_DIM))
    positions_T = 10_000_000 + torch.arange(MOST_ROWS)[chosen]
    radians_D = 500_000.0 ** (torch.arange(HEAD_DIM // 2, dtype=torch.float64) / -32)
    cos_TD, sin_TD = rows.cos_sin(positions_T, radians_D, 1.0, by.instructions)
    k_KSD, v_KSD = (torch.zeros(NUM_HEADS, MOST_ROWS, HEAD_DIM, dtype=by.dtype) for _ in range(2))
    rows.write(
        heads, y.view(heads.shape), torch.arange(MOST_ROWS)[chosen], k_KSD, v_KSD, by.instructions
    )
    return (
        rows.look_up(all_x, positions_T % 50, by.instructions),
        cos_TD,
        sin_TD,
        rows.rms_norm(x, weight, 1e-5, by.instructions),
        rows.rms_norm(heads, weight[:HEAD_DIM], 1e-5, by.instructions),
        rows.rotate(heads, cos_TD, sin_TD, by.instructions),
        rows.add(x, y, by.instructions),
        k_KSD[:, chosen].transpose(0, 1),
        v_KSD[:, chosen].transpose(0, 1),
    )


def test_a_row_has_the_same_bits_in_a_chunk_of_any_size(
    by: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = randn(by, MOST_ROWS, WIDTH), randn(by, WIDTH)
    together = everything(by, *data, 0, MOST_ROWS)

    for num_rows in by.some(range(1, MOST_ROWS)):
        row = (37 * num_rows) % (MOST_ROWS - num_rows + 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_rows: 1 + n % 2)
        for part, whole in zip(everything(by, *data, row, num_rows), together, strict=True):
            assert torch.equal(part, whole[row : row + num_rows])


def test_more_rows_than_64_take_all_threads(by: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    launch: Callable[..., None] = rows.launch
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)

    def noted(kernel: object, arguments: rows._Sum) -> None:
        found.append(arguments.num_threads)
        launch(kernel, arguments)

    monkeypatch.setattr(rows, "launch", noted)
    for num_rows in (1, 64, 65):
        rows.add(randn(by, num_rows, WIDTH), randn(by, num_rows, WIDTH), by.instructions)

    assert found == [1, 1, 3]
