"""The operators in torch: for any device and dtype, and the reference for the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.operators.contract import ExpertWeights, Rotary, Weights

CLAMP, SWISH = 7.0, 1.702  # of the clamped activation


def activate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Gate times its input, as in a gated MLP; both of the same shape.

    Args:
        gate: before it is activated.
        up: what passes.
        activation: ``silu``; ``gelu_tanh``, gelu by its approximation, which models that are
            trained with it define; or ``clamped``, gpt-oss's swish of a bounded gate times one more
            than what passes, bounded too.
    """
    if activation == "silu":
        return F.silu(gate) * up
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    assert activation == "clamped"
    gate = gate.clamp(max=CLAMP)
    return (up.clamp(-CLAMP, CLAMP) + 1) * (gate * torch.sigmoid(SWISH * gate))


class TorchOperators:
    """Plain torch (see ``Operators``); the compiler can trace all of it."""

    name = "torch"
    can_record = False
    can_compile = True

    def embed(self, ids_T: Tensor, table_VE: Tensor) -> Tensor:
        """See ``Operators``."""
        return F.embedding(ids_T, table_VE)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """See ``Operators``. Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
        if not offset:
            return F.rms_norm(x, weight.shape, weight, eps)
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), weight.shape, weight.to(wide) + offset, eps)
        return normed.to(x.dtype)

    def add(self, a_TE: Tensor, b_TE: Tensor) -> Tensor:
        """See ``Operators``."""
        return a_TE + b_TE

    def add_rms_norm(
        self,
        hidden_TE: Tensor,
        delta_TE: Tensor,
        weight_E: Tensor,
        eps: float,
        offset: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        """See ``Operators``."""
        total_TE = self.add(hidden_TE, delta_TE)
        return total_TE, self.rms_norm(total_TE, weight_E, eps, offset)

    def linear(self, x_TE: Tensor, layers: Sequence[Weights]) -> Sequence[Tensor]:
        """See ``Operators``."""
        return [F.linear(x_TE, weight_NE, bias_N) for weight_NE, bias_N in layers]

    def gated(self, x_TE: Tensor, gate: Weights, up: Weights, activation: str = "silu") -> Tensor:
        """See ``Operators``."""
        if activation != "silu":
            return activate(F.linear(x_TE, *gate), F.linear(x_TE, *up), activation)
        # no name: the gate's output is freed at once
        return F.silu(F.linear(x_TE, *gate)) * F.linear(x_TE, *up)

    def route(self, x_TE: Tensor, weight_XE: Tensor, bias_X: Tensor | None) -> Tensor:
        """See ``Operators``."""
        # Differences of float64 by the order of its sums are lost in float32.
        logits_TX = x_TE.double() @ weight_XE.double().t()
        if bias_X is not None:
            logits_TX = logits_TX + bias_X.double()
        return logits_TX.to(torch.promote_types(x_TE.dtype, torch.float32))

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
        """See ``Operators``."""
        num_chosen = experts_TC.shape[1]
        # Rows sorted by expert: each weight is read once, for all of its rows.
        order_R = experts_TC.flatten().argsort(stable=True)
        counts_X = experts_TC.flatten().bincount(minlength=len(weights.gate_XFE))
        sorted_RE = x_TE[order_R // num_chosen]
        if weighs_input:
            sorted_RE = (sorted_RE * weights_TC.flatten()[order_R, None]).to(x_TE.dtype)
        given_RE = torch.empty_like(sorted_RE)
        start = 0
        for expert, count in enumerate(counts_X.tolist()):
            if count:
                rows = slice(start, start + count)
                gate, up, down = weights.of(expert)
                wide_RF = self.gated(sorted_RE[rows], gate, up, activation)
                (given_RE[rows],) = self.linear(wide_RF, (down,))
                start += count
        # Each row's own experts are summed in the order of its choice, in float32 or wider.
        total_TE = torch.zeros_like(x_TE, dtype=weights_TC.dtype)
        places_TC = (
            torch.empty_like(order_R)
            .scatter_(0, order_R, torch.arange(len(order_R), device=x_TE.device))
            .view_as(experts_TC)
        )
        for place_T, weight_T in zip(places_TC.unbind(1), weights_TC.unbind(1), strict=True):
            taken_TE = given_RE[place_T].to(total_TE.dtype)
            total_TE += taken_TE if weighs_input else taken_TE * weight_T[:, None]
        return total_TE.to(x_TE.dtype)

    def angles(
        self, positions_T: Tensor, radians_D: Tensor, *, gain: float, dtype: torch.dtype
    ) -> Rotary:
        """See ``Operators``."""
        angle_TD = positions_T.double()[:, None] * radians_D
        return (angle_TD.cos() * gain).to(dtype), (angle_TD.sin() * gain).to(dtype)

    def rotate(self, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        """See ``Operators``."""
        first, second = x_THD.chunk(2, dim=-1)  # [T, H, D/2] each; products take the wider dtype
        cos, sin = cos_TD[:, None], sin_TD[:, None]
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned.to(x_THD.dtype)

    def write(
        self, k_TKD: Tensor, v_TKD: Tensor, slots_T: Tensor, k_KSD: Tensor, v_KSD: Tensor
    ) -> None:
        """See ``Operators``."""
        k_KSD.index_copy_(1, slots_T, k_TKD.transpose(0, 1))
        v_KSD.index_copy_(1, slots_T, v_TKD.transpose(0, 1))

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
        """See ``Operators``."""
        self.write(self.rotate(k_TKD, *rotary), v_TKD, slots_T, k_KSD, v_KSD)
        return self.rotate(q_THD, *rotary)

    def logits(self, hidden_BE: Tensor, weight_VE: Tensor) -> Tensor:
        """See ``Operators``."""
        wide = torch.promote_types(hidden_BE.dtype, torch.float32)
        if hidden_BE.is_cuda and hidden_BE.dtype != wide:
            return torch.mm(hidden_BE, weight_VE.t(), out_dtype=wide)
        (logits_BV,) = self.linear(hidden_BE, ((weight_VE, None),))
        return logits_BV.to(wide)


TORCH = TorchOperators()
