"""Linear layers of few rows on AVX-512 BF16; the torch original is ``F.linear``."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mnemosyne.kernels.cpu.library import load_library, what_is_missing

FEW_ROWS = 64  # up to which reading the weight bounds the speed, and this is the faster product


def is_fast_for(x_TE: Tensor, weight_NE: Tensor) -> bool:
    """Whether ``linear`` can compute a product here and is the faster way to do it."""
    return (
        x_TE.dtype == weight_NE.dtype == torch.bfloat16
        and x_TE.device.type == "cpu"
        and x_TE.shape[0] <= FEW_ROWS
        and x_TE.shape[1] % 32 == 0
        and weight_NE.is_contiguous()
        and what_is_missing() is None
    )


def linear(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for a few rows.

    Sums are float32, in the same order for every row, so that the bits of a row do not depend on
    the other rows.

    Args:
        x_TE: bfloat16, elements of a row contiguous; any number of rows.
        weight_NE: bfloat16, contiguous; E a multiple of 32.
        bias_N: bfloat16, contiguous.

    Returns:
        ``y_TN`` bfloat16.
    """
    num_rows, num_columns = x_TE.shape
    num_outputs = weight_NE.shape[0]
    assert x_TE.dtype == weight_NE.dtype == torch.bfloat16
    assert x_TE.stride(1) == 1
    assert weight_NE.is_contiguous()
    assert num_columns % 32 == 0
    y_TN = x_TE.new_empty(num_rows, num_outputs)
    compile_linear()(
        x_TE.data_ptr(),
        x_TE.stride(0),
        weight_NE.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        y_TN.data_ptr(),
        num_rows,
        num_outputs,
        num_columns,
        torch.get_num_threads(),
    )
    return y_TN


@cache
def compile_linear() -> Any:
    """The C function; compiled if it never was on this machine."""
    operator = load_library("linear").linear
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    operator.argtypes = [pointer, number, pointer, pointer, pointer, *(number,) * 4]
    operator.restype = None
    return operator
