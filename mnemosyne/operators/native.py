"""The operators as C++ kernels of a CPU's instructions; the one file that asks about shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.kernels.cpu import linear, rows
from mnemosyne.kernels.cpu.processor import InstructionSet
from mnemosyne.operators.contract import Rotary, Weights
from mnemosyne.operators.of_torch import TorchOperators, activate

VECTOR = 32  # elements; kernels take rows of whole vectors


class NativeOperators(TorchOperators):
    """Kernels in the dtypes of a set (see ``Operators``), each one call of C.

    Torch computes what they cannot take: rows of no multiple of 32 elements, or elements that
    lie apart; and so are products of more rows than those for which they are the faster.

    Args:
        instructions: a set that runs here.
    """

    can_record = True
    can_compile = False

    def __init__(self, instructions: InstructionSet) -> None:
        self.name = instructions.name
        self._instructions = instructions
        self._most_rows = instructions.most_rows

    def embed(self, ids_T: Tensor, table_VE: Tensor) -> Tensor:
        """See ``Operators``."""
        return rows.look_up(table_VE, ids_T, self._instructions)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """See ``Operators``."""
        if not _has_whole_rows(x):
            return super().rms_norm(x, weight, eps, offset)
        return rows.rms_norm(x, weight, eps, self._instructions, offset)

    def add(self, a_TE: Tensor, b_TE: Tensor) -> Tensor:
        """See ``Operators``."""
        if a_TE.shape[1] % VECTOR or not (a_TE.is_contiguous() and b_TE.is_contiguous()):
            return super().add(a_TE, b_TE)
        return rows.add(a_TE, b_TE, self._instructions)

    def linear(self, x_TE: Tensor, layers: Sequence[Weights]) -> Sequence[Tensor]:
        """See ``Operators``."""
        if not self._multiplies(x_TE):
            return super().linear(x_TE, layers)
        return linear.linear(x_TE, layers, self._instructions)

    def gated(self, x_TE: Tensor, gate: Weights, up: Weights, activation: str = "silu") -> Tensor:
        """See ``Operators``."""
        if not self._multiplies(x_TE):
            return super().gated(x_TE, gate, up, activation)
        if activation != "silu":
            opened_TF, raised_TF = self.linear(x_TE, (gate, up))
            return activate(opened_TF, raised_TF, activation)
        return linear.gated(x_TE, gate, up, self._instructions)

    def route(self, x_TE: Tensor, weight_XE: Tensor, bias_X: Tensor | None) -> Tensor:
        """See ``Operators``."""
        if not _has_whole_rows(x_TE):
            return super().route(x_TE, weight_XE, bias_X)
        logits_TX = rows.route(x_TE, weight_XE, self._instructions)
        return logits_TX if bias_X is None else logits_TX + bias_X.float()

    def angles(
        self, positions_T: Tensor, radians_D: Tensor, *, gain: float, dtype: torch.dtype
    ) -> Rotary:
        """See ``Operators``."""
        assert dtype == torch.float32
        return rows.cos_sin(positions_T, radians_D, gain, self._instructions)

    def rotate(self, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """See ``Operators``."""
        if not _has_whole_rows(x_THD):
            return super().rotate(x_THD, cos_TD, sin_TD)
        return rows.rotate(x_THD, cos_TD, sin_TD, self._instructions)

    def write(
        self, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor, k_KSD: Tensor, v_KSD: Tensor
    ) -> None:
        """See ``Operators``."""
        if not (_has_whole_rows(k_TKD) and _has_whole_rows(v_TKD)):
            super().write(k_TKD, v_TKD, slots_T, k_KSD, v_KSD)
            return
        rows.write(k_TKD, v_TKD, slots_T, k_KSD, v_KSD, self._instructions)

    def _multiplies(self, x_TE: Tensor) -> bool:
        """Return whether a product is one of the kernels'."""
        num_rows, num_columns = x_TE.shape
        is_few = self._most_rows is None or num_rows <= self._most_rows
        return is_few and num_columns % VECTOR == 0


def _has_whole_rows(x: Tensor) -> bool:
    """Return whether the kernels can take rows ``[T, E]`` or heads ``[T, H, D]``."""
    shape = x.shape
    return shape[-1] % VECTOR == 0 and x.stride()[1:] == (*shape[2:], 1)
