"""RMSNorm and rotation of few rows; the torch originals are ``F.rms_norm`` and ``rope.rotate``."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mnemosyne.kernels.cpu.library import load_library, what_is_missing

FEW_ROWS = 64  # up to which one thread is the faster way


def is_fast_for(x: Tensor) -> bool:
    """Whether the kernels can take rows ``[T, E]`` or heads ``[T, H, D]``, and are faster."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.shape[0] <= FEW_ROWS
        and x.shape[-1] % 32 == 0
        and x.stride()[1:] == (*x.shape[2:], 1)  # a row is contiguous
        and what_is_missing() is None
    )


def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim, in float32, rounded once.

    Args:
        x_TE: bfloat16, E a multiple of 32, the elements of a row contiguous; or heads ``[T, H, E]``
            which are normed each for itself.
        weight_E: bfloat16, contiguous.
        eps: added to the mean.

    Returns:
        bfloat16 of the shape of ``x_TE``, contiguous.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    width = x_TE.shape[-1]
    rows = x_TE if x_TE.dim() == 2 else x_TE.reshape(-1, width)
    assert rows.dtype == weight_E.dtype == torch.bfloat16
    assert rows.stride(1) == weight_E.stride(0) == 1
    assert width % 32 == 0
    y = rows.new_empty(rows.shape)
    compile_rows().rms_norm(
        rows.data_ptr(),
        rows.stride(0),
        weight_E.data_ptr(),
        eps,
        y.data_ptr(),
        len(rows),
        width,
    )
    return y.view(x_TE.shape)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of every head by its row's angle, in float32, rounded once.

    Args:
        x_THD: bfloat16, D a multiple of 32, the heads of a row contiguous.
        cos_TD: float32 [T, D/2], contiguous.
        sin_TD: likewise.

    Returns:
        bfloat16 of the shape of ``x_THD``, contiguous.
    """
    num_rows, num_heads, head_dim = x_THD.shape
    assert x_THD.dtype == torch.bfloat16
    assert x_THD.stride()[1:] == (head_dim, 1)
    assert cos_TD.dtype == sin_TD.dtype == torch.float32
    assert cos_TD.shape == sin_TD.shape == (num_rows, head_dim // 2)
    assert cos_TD.is_contiguous()
    assert sin_TD.is_contiguous()
    y_THD = x_THD.new_empty(x_THD.shape)
    compile_rows().rotate(
        x_THD.data_ptr(),
        x_THD.stride(0),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        y_THD.data_ptr(),
        num_rows,
        num_heads,
        head_dim,
    )
    return y_THD


@cache
def compile_rows() -> Any:
    """The C functions; compiled if they never were on this machine."""
    library = load_library("rows")
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.rms_norm.argtypes = [pointer, number, pointer, ctypes.c_double, pointer, number, number]
    library.rotate.argtypes = [pointer, number, pointer, pointer, pointer, number, number, number]
    library.rms_norm.restype = library.rotate.restype = None
    return library
