"""Operators on rows between products, each in one call of C++.

The torch originals are those of ``TorchOperators``. The bits of a row depend on that row alone.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mnemosyne.kernels.cpu.processor import InstructionSet
from mnemosyne.kernels.cpu.tape import launch

FEW_ELEMENTS = 1 << 16  # up to which starting other threads takes longer than one alone
ANGLE_ELEMENTS = 32  # elements that take as long as a cosine and a sine


def _numbers(*names: str) -> tuple[tuple[str, Any], ...]:
    return tuple((name, ctypes.c_int64) for name in names)


class _Lookup(ctypes.Structure):
    _fields_ = _numbers("table", "ids", "y", "num_rows", "width", "num_threads")


class _Angles(ctypes.Structure):
    _fields_ = (
        *_numbers("positions", "radians", "cos", "sin", "num_rows", "half", "num_threads"),
        ("gain", ctypes.c_double),
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        *_numbers("x", "x_stride", "weight", "y", "num_rows", "width", "num_threads"),
        ("eps", ctypes.c_double),
        ("offset", ctypes.c_double),
    )


class _Rotation(ctypes.Structure):
    _fields_ = _numbers(
        *("x", "x_stride", "cos", "sin", "y"),
        *("num_rows", "num_heads", "width", "num_threads"),
    )


class _Sum(ctypes.Structure):
    _fields_ = _numbers("a", "b", "y", "count", "num_threads")


class _Write(ctypes.Structure):
    _fields_ = _numbers(
        *("k", "v", "k_stride", "v_stride", "k_pool", "v_pool", "pool_stride"),
        *("slots", "num_rows", "num_heads", "width", "num_threads"),
    )


class _Route(ctypes.Structure):
    _fields_ = _numbers(
        *("x", "x_stride", "weight", "y"),
        *("num_rows", "width", "num_experts", "num_threads"),
    )


def _num_threads(num_elements: int) -> int:
    return 1 if num_elements <= FEW_ELEMENTS else torch.get_num_threads()


def look_up(table_VE: Tensor, ids_T: Tensor, instructions: InstructionSet) -> Tensor:
    """Some rows of a table.

    Args:
        table_VE: contiguous, a dtype of the set.
        ids_T: int64 row numbers, contiguous; each below V.
        instructions: a set that runs here.

    Returns:
        ``y_TE`` contiguous, in the same dtype.
    """
    assert table_VE.is_contiguous()
    assert ids_T.dtype == torch.int64
    assert ids_T.is_contiguous()
    y_TE = table_VE.new_empty((len(ids_T), table_VE.shape[1]))
    arguments = _Lookup(
        table_VE.data_ptr(),
        ids_T.data_ptr(),
        y_TE.data_ptr(),
        *y_TE.shape,
        _num_threads(y_TE.numel()),
    )
    launch(compile_rows(instructions, table_VE.dtype).look_up, arguments)
    return y_TE


def cos_sin(
    positions_T: Tensor, radians_D: Tensor, gain: float, instructions: InstructionSet
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * radians``, in float64, times ``gain``, rounded once.

    Args:
        positions_T: int64, contiguous.
        radians_D: float64 [D/2], contiguous.
        gain: factor on both.
        instructions: a set that runs here.

    Returns:
        ``cos_TD`` and ``sin_TD``, both float32 [T, D/2], contiguous.
    """
    assert positions_T.dtype == torch.int64
    assert radians_D.dtype == torch.float64
    assert positions_T.is_contiguous()
    assert radians_D.is_contiguous()
    shape = len(positions_T), len(radians_D)
    cos_TD, sin_TD = (radians_D.new_empty(shape, dtype=torch.float32) for _ in range(2))
    arguments = _Angles(
        positions_T.data_ptr(),
        radians_D.data_ptr(),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        *shape,
        _num_threads(ANGLE_ELEMENTS * cos_TD.numel()),
        gain,
    )
    launch(compile_rows(instructions, instructions.dtypes[0]).angles, arguments)
    return cos_TD, sin_TD


def rms_norm(
    x_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    instructions: InstructionSet,
    offset: float = 0.0,
) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dim, in float32.

    It is rounded once.

    Args:
        x_TE: a dtype of the set, E a multiple of 32, the elements of a row contiguous; or heads
            ``[T, H, E]`` which are normed each for itself.
        weight_E: contiguous, in the same dtype.
        eps: added to the mean.
        instructions: a set that runs here.
        offset: added to the weight.

    Returns:
        A tensor of the shape and dtype of ``x_TE``, contiguous.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    width = x_TE.shape[-1]
    rows = x_TE if x_TE.dim() == 2 else x_TE.reshape(-1, width)
    assert rows.dtype == weight_E.dtype
    assert rows.stride(1) == weight_E.stride(0) == 1
    assert width % 32 == 0
    y = rows.new_empty(rows.shape)
    arguments = _Norm(
        rows.data_ptr(),
        rows.stride(0),
        weight_E.data_ptr(),
        y.data_ptr(),
        len(rows),
        width,
        _num_threads(y.numel()),
        eps,
        offset,
    )
    launch(compile_rows(instructions, weight_E.dtype).rms_norm, arguments)
    return y.view(x_TE.shape)


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, instructions: InstructionSet) -> Tensor:
    """Turn each pair (i, i + D/2) of every head by its row's angle, in float32, rounded once.

    Args:
        x_THD: a dtype of the set, D a multiple of 32, the heads of a row contiguous.
        cos_TD: float32 [T, D/2], contiguous.
        sin_TD: likewise.
        instructions: a set that runs here.

    Returns:
        A tensor of the shape and dtype of ``x_THD``, contiguous.
    """
    num_rows, num_heads, head_dim = x_THD.shape
    assert x_THD.stride()[1:] == (head_dim, 1)
    assert cos_TD.dtype == sin_TD.dtype == torch.float32
    assert cos_TD.shape == sin_TD.shape == (num_rows, head_dim // 2)
    assert cos_TD.is_contiguous()
    assert sin_TD.is_contiguous()
    y_THD = x_THD.new_empty(x_THD.shape)
    arguments = _Rotation(
        x_THD.data_ptr(),
        x_THD.stride(0),
        cos_TD.data_ptr(),
        sin_TD.data_ptr(),
        y_THD.data_ptr(),
        num_rows,
        num_heads,
        head_dim,
        _num_threads(y_THD.numel()),
    )
    launch(compile_rows(instructions, x_THD.dtype).rotate, arguments)
    return y_THD


def add(a_TE: Tensor, b_TE: Tensor, instructions: InstructionSet) -> Tensor:
    """``a + b``, rounded once.

    Args:
        a_TE: a dtype of the set, contiguous, E a multiple of 32.
        b_TE: likewise, of the same shape.
        instructions: a set that runs here.

    Returns:
        ``y_TE`` contiguous, in the same dtype.
    """
    assert a_TE.dtype == b_TE.dtype
    assert a_TE.shape == b_TE.shape
    assert a_TE.is_contiguous()
    assert b_TE.is_contiguous()
    assert a_TE.shape[-1] % 32 == 0
    y_TE = a_TE.new_empty(a_TE.shape)
    count = a_TE.numel()
    arguments = _Sum(a_TE.data_ptr(), b_TE.data_ptr(), y_TE.data_ptr(), count, _num_threads(count))
    launch(compile_rows(instructions, a_TE.dtype).add, arguments)
    return y_TE


def write(
    k_TKD: Tensor,
    v_TKD: Tensor,
    slots_T: Tensor,
    k_KSD: Tensor,
    v_KSD: Tensor,
    instructions: InstructionSet,
) -> None:
    """Copy the keys and values of some rows to their slots.

    Args:
        k_TKD: a dtype of the set, the heads of a row contiguous.
        v_TKD: likewise, of the same shape.
        slots_T: int64, contiguous.
        k_KSD: keys of the whole pool, in the same dtype; each head contiguous.
        v_KSD: values, likewise, of the same strides.
        instructions: a set that runs here.
    """
    num_rows, num_heads, head_dim = k_TKD.shape
    assert k_TKD.dtype == v_TKD.dtype == k_KSD.dtype == v_KSD.dtype
    assert k_TKD.shape == v_TKD.shape
    assert k_TKD.stride()[1:] == v_TKD.stride()[1:] == (head_dim, 1)
    assert k_KSD.stride() == v_KSD.stride()
    assert k_KSD.stride()[1:] == (head_dim, 1)
    assert len(k_KSD) == len(v_KSD) == num_heads
    assert slots_T.dtype == torch.int64
    assert slots_T.shape == (num_rows,)
    assert slots_T.is_contiguous()
    arguments = _Write(
        k_TKD.data_ptr(),
        v_TKD.data_ptr(),
        k_TKD.stride(0),
        v_TKD.stride(0),
        k_KSD.data_ptr(),
        v_KSD.data_ptr(),
        k_KSD.stride(0),
        slots_T.data_ptr(),
        num_rows,
        num_heads,
        head_dim,
        _num_threads(2 * k_TKD.numel()),
    )
    launch(compile_rows(instructions, k_TKD.dtype).write, arguments)


def route(x_TE: Tensor, weight_XE: Tensor, instructions: InstructionSet) -> Tensor:
    """``x W^T`` in float32, the bits of a row independent of all other rows.

    Args:
        x_TE: a dtype of the set, E a multiple of 32, the elements of a row contiguous.
        weight_XE: contiguous, in the same dtype.
        instructions: a set that runs here.

    Returns:
        ``y_TX`` float32, contiguous.
    """
    width = x_TE.shape[1]
    assert x_TE.dtype == weight_XE.dtype
    assert x_TE.stride(1) == 1
    assert weight_XE.is_contiguous()
    assert width == weight_XE.shape[1]
    assert width % 32 == 0
    y_TX = x_TE.new_empty((len(x_TE), len(weight_XE)), dtype=torch.float32)
    arguments = _Route(
        x_TE.data_ptr(),
        x_TE.stride(0),
        weight_XE.data_ptr(),
        y_TX.data_ptr(),
        len(x_TE),
        width,
        len(weight_XE),
        _num_threads(y_TX.numel() * width // ANGLE_ELEMENTS),
    )
    launch(compile_rows(instructions, x_TE.dtype).route, arguments)
    return y_TX


@cache
def compile_rows(instructions: InstructionSet, dtype: torch.dtype) -> Any:
    """The C functions of a set for one dtype; compiled if they never were on this machine."""
    library = instructions.load(instructions.rows, dtype)
    for name in ("look_up", "angles", "rms_norm", "rotate", "add", "write", "route"):
        kernel = getattr(library, name)
        kernel.argtypes, kernel.restype = [ctypes.c_void_p], None
    return library
