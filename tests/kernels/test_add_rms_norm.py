"""The fused residual add and norm: what adding first and norming then would give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.add_rms_norm import MAX_WIDTH, add_rms_norm
from tests.attention.cases import assert_exact, assert_no_worse_than_eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-5


def make(num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = (num_rows, width), (num_rows, width), (width,)
    hidden, delta, weight = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes
    )
    return 8 * hidden, delta, weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1024), (5, 96), (3, 1), (2, 4099)])
def test_it_is_no_worse_than_to_add_and_then_norm(
    num_rows: int, width: int, dtype: torch.dtype
) -> None:
    hidden, delta, weight = make(num_rows, width, dtype)

    total, normed = add_rms_norm(hidden, delta, weight, EPS)

    assert total.dtype == normed.dtype == dtype
    assert_no_worse_than_eager(total, hidden + delta, hidden.double() + delta.double())
    # The stream rounds before it is normed; by truncation in the interpreter, for bfloat16.
    exact = F.rms_norm(total.double(), weight.shape, weight.double(), EPS)
    if dtype == torch.float64:
        largest = exact.abs().max()
        assert_exact(normed / largest, exact / largest)
    else:
        assert_no_worse_than_eager(normed, F.rms_norm(total, weight.shape, weight, EPS), exact)


def test_statistics_are_float32() -> None:
    hidden, delta, weight = make(2, 512, torch.float16)
    hidden, delta = hidden * 0 + 200, delta * 0  # squares and their sum pass float16's range

    _, normed = add_rms_norm(hidden, delta, weight * 0 + 1, EPS)

    assert torch.equal(normed, torch.ones_like(normed))


def test_no_rows_are_no_work() -> None:
    total, normed = add_rms_norm(*make(0, 64, torch.bfloat16), EPS)

    assert total.shape == normed.shape == (0, 64)


def test_a_row_too_wide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width must be <= 8192 .* got 8193; use torch"):
        add_rms_norm(*make(1, MAX_WIDTH + 1, torch.bfloat16), EPS)
