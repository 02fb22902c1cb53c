"""The products in C++, by every instruction set: no worse than torch, same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.cpu.linear import gated
from mnemosyne.kernels.cpu.linear import linear as linear_each
from tests.attention.cases import assert_no_worse_than_eager
from tests.kernels import sets
from tests.kernels.sets import Kernels

FEW_ROWS = 64  # up to which the product by AVX-512 is the faster


@pytest.fixture(params=sets.ALL, ids=str)
def by(request: pytest.FixtureRequest) -> Kernels:
    """Name what computes."""
    return sets.runnable(request.param)


def make(
    by: Kernels, num_rows: int, num_outputs: int, num_columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + num_outputs)
    shapes = (num_rows, num_columns), (num_outputs, num_columns), (num_outputs,)
    x, w, b = (torch.randn(shape, generator=generator).to(by.dtype) for shape in shapes)
    return x, w, b


def linear(by: Kernels, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    (y,) = linear_each(x, [(w, b)], by.instructions)
    return y


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [1, 15, 16, 17, 31, 64, 67, 330])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 16, 17, 33, FEW_ROWS, 131])
def test_it_is_no_worse_than_torch(
    by: Kernels, num_rows: int, num_outputs: int, has_bias: bool
) -> None:
    x, w, bias = make(by, num_rows, num_outputs, 96)
    b = bias if has_bias else None

    y = linear(by, x, w, b)

    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_no_worse_than_eager(y, F.linear(x, w, b), exact)


@pytest.mark.parametrize("num_columns", [32, 1024, 2816, 4128, 14336])
def test_many_rows_of_any_width_are_no_worse_than_torch(by: Kernels, num_columns: int) -> None:
    x, w, b = make(by, *((100, 70) if by.is_emulated else (700, 600)), num_columns)

    y = linear(by, x, w, b)

    exact = F.linear(x.double(), w.double(), b.double())
    assert_no_worse_than_eager(y, F.linear(x, w, b), exact)


def test_a_row_has_the_same_bits_in_any_company_and_number_of_threads(
    by: Kernels,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, b = make(by, FEW_ROWS, 200, 1024)
    together = linear(by, x, w, b)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = torch.cat([linear(by, row, w, b) for row in x.split(1)])

    assert torch.equal(together, alone)


@pytest.mark.parametrize(
    ("num_outputs", "num_columns"), [(75, 96), (67, 1056), (75, 2816), (335, 5152)]
)
def test_a_row_has_the_same_bits_among_any_number_of_rows(
    by: Kernels, num_outputs: int, num_columns: int
) -> None:
    if num_columns > 2000:
        sets.skip_if_emulated(by.instructions)
    x, w, b = make(by, 700, num_outputs, num_columns)
    other = w.flip(0).contiguous()
    y, gate = linear(by, x, w, b), gated(x, (w, b), (other, None), by.instructions)

    for num_rows in by.some((*range(1, 201), 400)):
        first = num_rows % 37  # other rows beside them, and another place among these
        rows = slice(first, first + num_rows)
        assert torch.equal(linear(by, x[rows], w, b), y[rows])
        assert torch.equal(gated(x[rows], (w, b), (other, None), by.instructions), gate[rows])


def test_rows_may_lie_apart(by: Kernels) -> None:
    for num_rows in (5, 40):
        x, w, _ = make(by, num_rows, 64, 128)

        assert torch.equal(
            linear(by, x[::2, :64], w[:, :64].contiguous()),
            linear(by, x[::2, :64].contiguous(), w[:, :64].contiguous()),
        )


@pytest.mark.parametrize("num_rows", [1, 3, 8, 40, 100])
def test_layers_of_one_input_give_what_each_gives_alone(by: Kernels, num_rows: int) -> None:
    layers = []
    for num_outputs in (200, 64, 3, 67):
        x, w, b = make(by, num_rows, num_outputs, 128)
        layers.append((w, b if num_outputs % 2 else None))

    together = linear_each(x, layers, by.instructions)

    for y, (w, b) in zip(together, layers, strict=True):
        assert torch.equal(y, linear(by, x, w, b))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [5, 16, 31, 330])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 20, FEW_ROWS, 700])
def test_a_gated_pair_is_no_worse_than_torch(
    by: Kernels, num_rows: int, num_outputs: int, has_bias: bool
) -> None:
    if num_rows > FEW_ROWS and has_bias:
        sets.skip_if_emulated(by.instructions)
    x, gate, gate_bias = make(by, num_rows, num_outputs, 96)
    _, up, up_bias = make(by, num_rows + 1, num_outputs, 96)
    biases = (gate_bias, up_bias) if has_bias else (None, None)

    y = gated(x, (gate, biases[0]), (up, biases[1]), by.instructions)

    def pair(*tensors: Tensor | None) -> Tensor:
        x, gate, up, gate_bias, up_bias = tensors
        assert x is not None
        assert gate is not None
        assert up is not None
        return F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)

    exact = pair(*(None if t is None else t.double() for t in (x, gate, up, *biases)))
    assert_no_worse_than_eager(y, pair(x, gate, up, *biases), exact)
