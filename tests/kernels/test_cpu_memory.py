"""Tensors in huge pages are ordinary zeros, aligned."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.kernels.cpu.memory import HUGE, huge_zeros


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1024, 1025), (2, 1024, 1536)])
def test_they_are_zeros_that_may_be_written(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = huge_zeros(shape, dtype)
    y = huge_zeros(shape, dtype)

    y.fill_(1)

    assert torch.equal(x, torch.zeros(shape, dtype=dtype))
    assert torch.equal(y, torch.ones(shape, dtype=dtype))


def test_a_large_one_is_aligned_to_huge_pages() -> None:
    assert huge_zeros((1 << 21,), torch.bfloat16).data_ptr() % HUGE == 0
