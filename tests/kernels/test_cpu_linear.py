"""The C++ product of few rows: no worse than torch, and the same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.cpu.library import what_is_missing
from mnemosyne.kernels.cpu.linear import FEW_ROWS, gated, is_fast_for
from mnemosyne.kernels.cpu.linear import linear as linear_each
from tests.attention.cases import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(what_is_missing() is not None, reason=str(what_is_missing()))


def make(num_rows: int, num_outputs: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + num_outputs)
    shapes = (num_rows, num_columns), (num_outputs, num_columns), (num_outputs,)
    x, w, b = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return x, w, b


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    (y,) = linear_each(x, [(w, b)])
    return y


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [1, 64, 67, 330])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, FEW_ROWS])
def test_it_is_no_worse_than_torch(num_rows: int, num_outputs: int, has_bias: bool) -> None:
    x, w, bias = make(num_rows, num_outputs, 96)
    b = bias if has_bias else None

    y = linear(x, w, b)

    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_no_worse_than_eager(y, F.linear(x, w, b), exact)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_the_operator_of_a_graph_takes_any_number_of_rows(num_rows: int, has_bias: bool) -> None:
    x, w, bias = make(num_rows, 67, 96)
    arguments = x, [w, w[:3]], [bias, bias[:3]] if has_bias else [None, None]

    torch.library.opcheck(torch.ops.mnemosyne.linear.default, arguments)
    parts = torch.ops.mnemosyne.linear(*arguments).split([67 * num_rows, 3 * num_rows])

    for y, w, b in zip(parts, *arguments[1:], strict=True):
        exact = F.linear(x.double(), w.double(), None if b is None else b.double())
        assert_no_worse_than_eager(y.view(num_rows, -1), F.linear(x, w, b), exact)


def test_a_row_has_the_same_bits_in_any_company_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, b = make(FEW_ROWS, 200, 1024)
    together = linear(x, w, b)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = torch.cat([linear(row, w, b) for row in x.split(1)])

    assert torch.equal(together, alone)


def test_rows_may_lie_apart() -> None:
    x, w, _ = make(5, 64, 128)

    assert torch.equal(
        linear(x[::2, :64], w[:, :64].contiguous()),
        linear(x[::2, :64].contiguous(), w[:, :64].contiguous()),
    )


def test_what_it_cannot_or_need_not_do_is_left_to_torch() -> None:
    x, w, _ = make(4, 64, 64)

    assert is_fast_for(x, w)
    assert not is_fast_for(x.float(), w.float())
    assert not is_fast_for(x[:, :48], w[:, :48].contiguous())
    assert not is_fast_for(x, w.t())
    assert not is_fast_for(x.expand(1, 4, 64).reshape(4, 64).repeat(20, 1), w)


@pytest.mark.parametrize("num_rows", [1, 3, 8])
def test_layers_of_one_input_give_what_each_gives_alone(num_rows: int) -> None:
    layers = []
    for num_outputs in (200, 64, 3, 67):
        x, w, b = make(num_rows, num_outputs, 128)
        layers.append((w, b if num_outputs % 2 else None))

    together = linear_each(x, layers)

    for y, (w, b) in zip(together, layers, strict=True):
        assert torch.equal(y, linear(x, w, b))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_rows", [1, 2, 7, FEW_ROWS])
def test_a_gated_pair_is_no_worse_than_torch(num_rows: int, has_bias: bool) -> None:
    x, gate, gate_bias = make(num_rows, 330, 96)
    _, up, up_bias = make(num_rows + 1, 330, 96)
    biases = (gate_bias, up_bias) if has_bias else (None, None)

    y = gated(x, (gate, biases[0]), (up, biases[1]))

    def pair(*tensors: Tensor | None) -> Tensor:
        x, gate, up, gate_bias, up_bias = tensors
        assert x is not None
        assert gate is not None
        assert up is not None
        return F.silu(F.linear(x, gate, gate_bias)) * F.linear(x, up, up_bias)

    exact = pair(*(None if t is None else t.double() for t in (x, gate, up, *biases)))
    assert_no_worse_than_eager(y, pair(x, gate, up, *biases), exact)
