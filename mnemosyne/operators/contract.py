"""The contract of all sets of operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor | None]  # of a linear layer: [N, E], and the bias [N] if it has one
Rotary = tuple[Tensor, Tensor]  # cos and sin of the rows of a step, both [T, D/2]


class ExpertWeights(NamedTuple):
    """The weights of X experts, each a gated MLP."""

    gate_XFE: Tensor
    up_XFE: Tensor
    down_XEF: Tensor
    gate_bias_XF: Tensor | None = None
    up_bias_XF: Tensor | None = None
    down_bias_XE: Tensor | None = None

    def of(self, expert: int) -> tuple[Weights, Weights, Weights]:
        """Gate, up and down of one expert."""
        gate, up, down = (
            (stack[expert], None if bias is None else bias[expert])
            for stack, bias in zip(self[:3], self[3:], strict=True)
        )
        return gate, up, down


class Operators(Protocol):
    """Operators of a model between two attentions; one set per engine.

    Modules call it inside their ``forward``, so that whatever is attached to a module keeps
    working. Results have the dtype of their first tensor unless it says otherwise.
    """

    name: str
    can_record: bool  # whether on CPU a tape can repeat them: every one is a call of C
    can_compile: bool  # whether torch.compile can trace them

    def embed(self, ids_T: Tensor, table_VE: Tensor) -> Tensor:
        """Rows of a table, [T, E]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dim.

        In float32 or wider, the sum of weight and offset too.
        """

    def add(self, a_TE: Tensor, b_TE: Tensor) -> Tensor:
        """``a + b``."""

    def add_rms_norm(
        self,
        hidden_TE: Tensor,
        delta_TE: Tensor,
        weight_E: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """The sum of a residual stream and what a layer adds to it, and the sum normed."""

    def linear(self, x_TE: Tensor, layers: Sequence[Weights]) -> Sequence[Tensor]:
        """``x W^T + b`` of each of some layers of one input."""

    def gated(self, x_TE: Tensor, gate: Weights, up: Weights, activation: str = "silu") -> Tensor:
        """``activation(gate(x)) * up(x)``, see ``activate``."""

    def route(self, x_TE: Tensor, weight_XE: Tensor, bias_X: Tensor | None) -> Tensor:
        """``x W^T + b`` in float32 or wider, [T, X]; rows do not depend on their company."""

    def experts(
        self,
        x_TE: Tensor,
        experts_TC: Tensor,
        weights_TC: Tensor,
        weights: ExpertWeights,
        *,
        activation: str,
        weighs_input: bool,
    ) -> Tensor:
        """The weighted sum over the experts of each row, [T, E].

        Args:
            x_TE: rows.
            experts_TC: int64, the experts that each row is given to.
            weights_TC: by how much each counts, float32 or wider.
            weights: of all experts, or the same part of each.
            activation: of their gates.
            weighs_input: whether weights multiply what experts are given, not what they give.
        """

    def angles(
        self, positions_T: Tensor, radians_D: Tensor, *, gain: float, dtype: torch.dtype
    ) -> Rotary:
        """Cosine and sine of ``positions * radians``, times ``gain``; formed in float64.

        Args:
            positions_T: int64.
            radians_D: float64 [D/2], per position.
            gain: factor on both.
            dtype: of the results, float32 or wider.
        """

    def rotate(self, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """Turn each pair (i, i + D/2) of every head by its row's angle."""

    def write(
        self, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor, k_KSD: Tensor, v_KSD: Tensor
    ) -> None:
        """Store keys and values of a step at their slots, int64, of the pools."""

    def rotate_and_write(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rotary: Rotary,
        slots_T: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
    ) -> Tensor:
        """Rotate queries and keys, store keys and values; the rotated ``q_THD``."""

    def logits(self, hidden_BE: Tensor, weight_VE: Tensor) -> Tensor:
        """``hidden W^T``, [B, V], float32 or wider; see ``Decoder.logits``."""
