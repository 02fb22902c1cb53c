"""The products in C++, by AVX-512 and by AMX: no worse than torch, same bits in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnemosyne.kernels.cpu import linear as module
from mnemosyne.kernels.cpu.linear import FEW_ROWS, gated, is_fast_for
from mnemosyne.kernels.cpu.linear import linear as linear_each
from mnemosyne.kernels.cpu.processor import AMX, AVX512
from mnemosyne.model_zoo import layers as zoo
from tests.attention.cases import assert_no_worse_than_eager

pytestmark = pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not()))


@pytest.fixture(params=["avx512", "amx"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two computes."""
    if request.param == "amx" and (why_not := AMX.why_not()) is not None:
        pytest.skip(why_not)
    monkeypatch.setattr(module, "has_amx", lambda: request.param == "amx")
    return str(request.param)


def make(num_rows: int, num_outputs: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows + num_outputs)
    shapes = (num_rows, num_columns), (num_outputs, num_columns), (num_outputs,)
    x, w, b = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    return x, w, b


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    (y,) = linear_each(x, [(w, b)])
    return y


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [1, 15, 16, 17, 31, 64, 67, 330])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 6, 7, 16, 17, 33, FEW_ROWS, 131])
def test_it_is_no_worse_than_torch(num_rows: int, num_outputs: int, has_bias: bool) -> None:
    x, w, bias = make(num_rows, num_outputs, 96)
    b = bias if has_bias else None

    y = linear(x, w, b)

    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_no_worse_than_eager(y, F.linear(x, w, b), exact)


@pytest.mark.parametrize("num_columns", [32, 1024, 2816, 4128, 14336])
def test_many_rows_of_any_width_are_no_worse_than_torch(num_columns: int) -> None:
    x, w, b = make(700, 600, num_columns)

    y = linear(x, w, b)

    exact = F.linear(x.double(), w.double(), b.double())
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


@pytest.mark.parametrize("num_rows", [1, FEW_ROWS + 1])
def test_the_operator_of_a_gate_takes_any_number_of_rows(num_rows: int, kernel: str) -> None:
    x, w, b = make(num_rows, 67, 96)
    arguments = x, w, b, w.flip(0), None

    torch.library.opcheck(torch.ops.mnemosyne.gated.default, arguments)
    y = torch.ops.mnemosyne.gated(*arguments)

    pairs = (w, b), (w.flip(0), None)
    of_torch = F.silu(F.linear(x, *pairs[0])) * F.linear(x, *pairs[1])
    is_ours = kernel == "amx" or num_rows <= FEW_ROWS
    assert torch.equal(y, gated(x, *pairs) if is_ours else of_torch)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@torch.inference_mode()
def test_a_compiled_mlp_has_the_bits_of_an_eager_one(kernel: str) -> None:
    if kernel == "avx512":
        pytest.skip("there the compiler fuses the gate, which rounds what it lets through")
    for ask in (module.can_run, module.has_amx):
        torch.compiler.assume_constant_result(ask)
    gate, up = (zoo.Linear(64, 96, bias=False, dtype=torch.bfloat16) for _ in range(2))

    def mlp(x_TE: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
        return zoo.gate(x_TE, gate, up)

    compiled = torch.compile(mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows in (2, 5, 100):
        x, _, _ = make(num_rows, 1, 64)
        assert torch.equal(compiled(x, gate, up), mlp(x, gate, up))


def test_a_row_has_the_same_bits_in_any_company_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w, b = make(FEW_ROWS, 200, 1024)
    together = linear(x, w, b)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = torch.cat([linear(row, w, b) for row in x.split(1)])

    assert torch.equal(together, alone)


@pytest.mark.parametrize(("num_outputs", "num_columns"), [(75, 96), (75, 2816), (335, 5152)])
def test_a_row_has_the_same_bits_among_any_number_of_rows(
    num_outputs: int, num_columns: int
) -> None:
    x, w, b = make(700, num_outputs, num_columns)
    other = w.flip(0).contiguous()
    y, gate = linear(x, w, b), gated(x, (w, b), (other, None))

    for num_rows in (*range(1, 201), 400):
        first = num_rows % 37  # other rows beside them, and another place among these
        rows = slice(first, first + num_rows)
        assert torch.equal(linear(x[rows], w, b), y[rows])
        assert torch.equal(gated(x[rows], (w, b), (other, None)), gate[rows])


def test_rows_may_lie_apart() -> None:
    for num_rows in (5, 40):
        x, w, _ = make(num_rows, 64, 128)

        assert torch.equal(
            linear(x[::2, :64], w[:, :64].contiguous()),
            linear(x[::2, :64].contiguous(), w[:, :64].contiguous()),
        )


def test_what_it_cannot_or_need_not_do_is_left_to_torch(kernel: str) -> None:
    x, w, _ = make(4, 64, 64)

    assert is_fast_for(x, w)
    assert not is_fast_for(x.float(), w.float())
    assert not is_fast_for(x[:, :48], w[:, :48].contiguous())
    assert not is_fast_for(x, w.t())
    assert is_fast_for(x.repeat(20, 1), w) == (kernel == "amx")


@pytest.mark.parametrize("num_rows", [1, 3, 8, 40, 100])
def test_layers_of_one_input_give_what_each_gives_alone(num_rows: int) -> None:
    layers = []
    for num_outputs in (200, 64, 3, 67):
        x, w, b = make(num_rows, num_outputs, 128)
        layers.append((w, b if num_outputs % 2 else None))

    together = linear_each(x, layers)

    for y, (w, b) in zip(together, layers, strict=True):
        assert torch.equal(y, linear(x, w, b))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("num_outputs", [5, 16, 31, 330])
@pytest.mark.parametrize("num_rows", [1, 2, 7, 20, FEW_ROWS, 700])
def test_a_gated_pair_is_no_worse_than_torch(
    num_rows: int, num_outputs: int, has_bias: bool
) -> None:
    x, gate, gate_bias = make(num_rows, num_outputs, 96)
    _, up, up_bias = make(num_rows + 1, num_outputs, 96)
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
