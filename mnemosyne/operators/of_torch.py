"""The operators in torch: any device and dtype, and what the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.operators.contract import Rotary, Weights


def activate(x: Tensor, activation: str) -> Tensor:
    """Silu, or gelu by its tanh approximation, which models that are trained with it define."""
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


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
        # no name: what the gate gave is freed at once
        return activate(F.linear(x_TE, *gate), activation) * F.linear(x_TE, *up)

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
