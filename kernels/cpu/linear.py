"""Linear layers in bfloat16, by AMX where there is AMX, or else of few rows by AVX-512 BF16.

The torch original is ``F.linear``. In a graph of ``torch.compile`` they are the operators
``mnemosyne::linear`` and ``mnemosyne::gated``, which take any number of rows, because one graph
serves many.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mnemosyne.kernels.cpu.processor import AMX, AVX512
from mnemosyne.kernels.cpu.tape import launch

FEW_ROWS = 64  # up to which the product by AVX-512 is faster than torch's

Layer = tuple[Tensor, Tensor | None]  # weight and bias


class _Call(ctypes.Structure):
    """What the kernels take."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("x", "x_stride", "parts", "num_parts", "y"),
            *("num_rows", "num_columns", "num_threads"),
        )
    )


def is_fast_for(x_TE: Tensor, weight_NE: Tensor) -> bool:
    """Whether ``linear`` can compute a product here and is the faster way to do it."""
    return (
        x_TE.dtype == weight_NE.dtype == torch.bfloat16
        and x_TE.device.type == "cpu"
        and (torch.compiler.is_compiling() or _is_faster(x_TE.shape[0]))
        and x_TE.shape[1] % 32 == 0
        and weight_NE.is_contiguous()
        and can_run()
    )


def _is_faster(num_rows: int) -> bool:
    return num_rows <= FEW_ROWS or has_amx()


def linear(x_TE: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """``x W^T + b`` of several layers, in one call.

    Sums are float32, in the same order for every row, so that the bits of a row do not depend on
    the other rows.

    Args:
        x_TE: bfloat16, elements of a row contiguous; any number of rows.
        layers: of each the weight [N, E], bfloat16, contiguous, E a multiple of 32, and the bias
            [N], bfloat16, contiguous.

    Returns:
        ``y_TN`` of each layer, bfloat16, contiguous.
    """
    num_rows = x_TE.shape[0]  # len() would have a graph serve one number of rows
    sizes = [weight.shape[0] * num_rows for weight, _ in layers]
    if torch.compiler.is_compiling():
        weights, biases = [weight for weight, _ in layers], [bias for _, bias in layers]
        y = torch.ops.mnemosyne.linear(x_TE, weights, biases)
    else:
        y = _linear(x_TE, layers)
    return tuple(part.view(num_rows, -1) for part in y.split(sizes))


def _linear(x_TE: Tensor, layers: Sequence[Layer]) -> Tensor:
    """What ``linear`` gives, one layer after another in one dimension."""
    num_rows = _check(x_TE, layers)
    y = x_TE.new_empty(num_rows * sum(len(weight) for weight, _ in layers))
    _launch(compile_linear(has_amx()).linear, x_TE, layers, y)
    return y


def gated(x_TE: Tensor, gate: Layer, up: Layer) -> Tensor:
    """``silu(gate(x)) * up(x)`` of two layers, rounded once.

    Args:
        x_TE: as for ``linear``.
        gate: weight [F, E] and bias.
        up: likewise, of the same shape.

    Returns:
        ``y_TF`` bfloat16.
    """
    if torch.compiler.is_compiling():
        return torch.ops.mnemosyne.gated(x_TE, *gate, *up)
    num_rows = _check(x_TE, (gate, up))
    assert gate[0].shape == up[0].shape
    y_TF = x_TE.new_empty(num_rows, len(gate[0]))
    _launch(compile_linear(has_amx()).gated, x_TE, (gate, up), y_TF)
    return y_TF


def _check(x_TE: Tensor, layers: Sequence[Layer]) -> int:
    num_rows, num_columns = x_TE.shape
    assert x_TE.stride(1) == 1
    assert num_columns % 32 == 0
    for weight, _ in layers:
        assert x_TE.dtype == weight.dtype == torch.bfloat16
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


def can_run() -> bool:
    """Whether the kernels run here; a graph takes the answer of the time when it is made."""
    return AVX512.why_not() is None


def has_amx() -> bool:
    """Whether the kernels are those of AMX; a graph takes the answer as that of ``can_run``."""
    return AMX.why_not() is None


torch.library.define(
    "mnemosyne::linear", "(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor"
)
torch.library.define(
    "mnemosyne::gated",
    "(Tensor x, Tensor gate, Tensor? gate_bias, Tensor up, Tensor? up_bias) -> Tensor",
)


@torch.library.impl("mnemosyne::linear", "CPU")
def _linear_of_any_rows(x_TE: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    """``_linear``, or torch's product where that is the faster one."""
    num_rows = len(x_TE)
    if _is_faster(num_rows):
        return _linear(x_TE, list(zip(weights, biases, strict=True)))
    y = x_TE.new_empty(num_rows * sum(map(len, weights)))
    parts = y.split([num_rows * len(weight) for weight in weights])
    for part, weight_NE, bias_N in zip(parts, weights, biases, strict=True):
        y_TN = part.view(num_rows, -1)
        if bias_N is None:
            torch.mm(x_TE, weight_NE.t(), out=y_TN)
        else:
            torch.addmm(bias_N, x_TE, weight_NE.t(), out=y_TN)
    return y


@torch.library.register_fake("mnemosyne::linear")
def _linear_shape(x_TE: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> Tensor:
    return x_TE.new_empty(x_TE.shape[0] * sum(map(len, weights)))


@torch.library.impl("mnemosyne::gated", "CPU")
def _gated_of_any_rows(
    x_TE: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None
) -> Tensor:
    """``gated``, or torch's operators where these are faster."""
    if _is_faster(len(x_TE)):
        return gated(x_TE, (gate, gate_bias), (up, up_bias))
    return F.silu(F.linear(x_TE, gate, gate_bias)) * F.linear(x_TE, up, up_bias)


@torch.library.register_fake("mnemosyne::gated")
def _gated_shape(
    x_TE: Tensor, gate: Tensor, gate_bias: Tensor | None, up: Tensor, up_bias: Tensor | None
) -> Tensor:
    return x_TE.new_empty(x_TE.shape[0], gate.shape[0])


@cache
def compile_linear(has_amx: bool) -> Any:
    """The C functions, of AMX or of AVX-512; compiled if they never were on this machine."""
    instructions = AMX if has_amx else AVX512
    library = instructions.load(instructions.linear)
    library.linear.argtypes = library.gated.argtypes = [ctypes.c_void_p]
    library.linear.restype = library.gated.restype = None
    return library
