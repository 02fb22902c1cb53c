"""Linear layers by the C++ kernels of a processor; the torch original is ``F.linear``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from mnemosyne.kernels.cpu.processor import InstructionSet
from mnemosyne.kernels.cpu.tape import launch

Layer = tuple[Tensor, Tensor | None]  # weight and bias


class _Call(ctypes.Structure):
    """The argument of the kernels."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("x", "x_stride", "parts", "num_parts", "y"),
            *("num_rows", "num_columns", "num_threads"),
        )
    )


def linear(
    x_TE: Tensor, layers: Sequence[Layer], instructions: InstructionSet
) -> tuple[Tensor, ...]:
    """``x W^T + b`` of several layers, in one call.

    Sums are float32, in the same order for every row, so that the bits of a row do not depend on
    the other rows.

    Args:
        x_TE: a dtype of the set, elements of a row contiguous; any number of rows.
        layers: of each the weight [N, E], contiguous, E a multiple of 32, and the bias [N],
            contiguous, in the same dtype.
        instructions: a set that runs here.

    Returns:
        ``y_TN`` of each layer, contiguous, in the same dtype.
    """
    num_rows = _check(x_TE, layers)
    sizes = [len(weight) * num_rows for weight, _ in layers]
    y = x_TE.new_empty(sum(sizes))  # one layer after another
    _launch(compile_linear(instructions, x_TE.dtype).linear, x_TE, layers, y)
    return tuple(part.view(num_rows, -1) for part in y.split(sizes))


def gated(x_TE: Tensor, gate: Layer, up: Layer, instructions: InstructionSet) -> Tensor:
    """``silu(gate(x)) * up(x)`` of two layers, rounded once.

    Args:
        x_TE: as for ``linear``.
        gate: weight [F, E] and bias.
        up: likewise, of the same shape.
        instructions: a set that runs here.

    Returns:
        ``y_TF`` in the same dtype.
    """
    num_rows = _check(x_TE, (gate, up))
    assert gate[0].shape == up[0].shape
    y_TF = x_TE.new_empty(num_rows, len(gate[0]))
    _launch(compile_linear(instructions, x_TE.dtype).gated, x_TE, (gate, up), y_TF)
    return y_TF


def _check(x_TE: Tensor, layers: Sequence[Layer]) -> int:
    num_rows, num_columns = x_TE.shape
    assert x_TE.stride(1) == 1
    assert num_columns % 32 == 0
    for weight, _ in layers:
        assert x_TE.dtype == weight.dtype
        assert weight.is_contiguous()
        assert weight.shape[1] == num_columns
    return num_rows


def _launch(kernel: Any, x_TE: Tensor, layers: Sequence[Layer], y: Tensor) -> None:
    table = _table(layers)
    arguments = _Call(
        x_TE.data_ptr(),
        x_TE.stride(0),
        ctypes.addressof(table),
        len(layers),
        y.data_ptr(),
        *x_TE.shape,
        torch.get_num_threads(),
    )
    launch(kernel, arguments, table)


def _table(layers: Sequence[Layer]) -> Any:
    fields: list[int] = []
    for weight, bias in layers:
        fields += weight.data_ptr(), 0 if bias is None else bias.data_ptr(), len(weight)
    return _array(*fields)


@lru_cache(maxsize=4096)
def _array(*fields: int) -> Any:
    """The table of some layers as C has it: weight, bias and number of outputs of each."""
    return (ctypes.c_int64 * len(fields))(*fields)


@cache
def compile_linear(instructions: InstructionSet, dtype: torch.dtype) -> Any:
    """The C functions of a set for one dtype; compiled if they never were on this machine."""
    library = instructions.load(instructions.linear, dtype)
    library.linear.argtypes = library.gated.argtypes = [ctypes.c_void_p]
    library.linear.restype = library.gated.restype = None
    return library
