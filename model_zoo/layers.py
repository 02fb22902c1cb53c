"""The pieces of a decoder layer. They know neither pages nor ranks: inputs arrive as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.attention.segments import Attend
from mnemosyne.kernels.cpu import linear, rows
from mnemosyne.model_zoo.rope import rotate
from mnemosyne.model_zoo.spec import ModelSpec

FeedForward = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # an MLP and its input


class Embedding(nn.Embedding):
    """``nn.Embedding``; in bfloat16 on CPU rows take the kernel that is one call."""

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight, [T, E]."""
        if torch.compiler.is_compiling() or not rows.can_run(ids_T, self.weight.dtype):
            return super().forward(ids_T)
        return rows.look_up(self.weight, ids_T)


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``; in bfloat16 on CPU rows take the kernel that is one call."""

    def forward(self, x: Tensor) -> Tensor:
        """RMSNorm over the last dim, computed in float32 or wider."""
        if torch.compiler.is_compiling() or not rows.can_take(x):
            return super().forward(x)
        assert self.eps is not None
        return rows.rms_norm(x, self.weight, self.eps)


def norm(width: int, spec: ModelSpec) -> RMSNorm:
    """RMSNorm over the last dim; it is computed in float32 or wider."""
    return RMSNorm(width, eps=spec.norm_eps)


class Linear(nn.Linear):
    """``nn.Linear``; in bfloat16 on CPU by the project's own kernel where it is faster."""

    def forward(self, x_TE: Tensor) -> Tensor:
        """``x W^T + b``, in the dtype of ``x_TE``."""
        return multiply(x_TE, self.weight, self.bias)


def multiply(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``x W^T + b``, in the dtype of ``x_TE``, by whichever product is the faster."""
    if linear.is_fast_for(x_TE, weight_NE):
        return linear.linear(x_TE, [(weight_NE, bias_N)])[0]
    return F.linear(x_TE, weight_NE, bias_N)


def multiply_each(x_TE: Tensor, layers: Sequence[nn.Linear]) -> Sequence[Tensor]:
    """What each of some layers of one input gives."""
    if all(linear.is_fast_for(x_TE, layer.weight) for layer in layers):
        return linear.linear(x_TE, [(layer.weight, layer.bias) for layer in layers])
    return [layer(x_TE) for layer in layers]


def gate(x_TE: Tensor, gate: nn.Linear, up: nn.Linear) -> Tensor:
    """``silu(gate(x)) * up(x)``."""
    layers = gate, up
    if not all(linear.is_fast_for(x_TE, layer.weight) for layer in layers):
        return F.silu(gate(x_TE)) * up(x_TE)  # no name: what the gate gave is freed at once
    if torch.compiler.is_compiling() and not linear.has_amx():
        gate_TF, up_TF = multiply_each(x_TE, layers)  # the compiler fuses the rest for many rows
        return F.silu(gate_TF) * up_TF
    return linear.gated(x_TE, *((layer.weight, layer.bias) for layer in layers))


def add(a_TE: Tensor, b_TE: Tensor) -> Tensor:
    """``a + b``."""
    if torch.compiler.is_compiling() or not (
        rows.can_take(a_TE) and a_TE.is_contiguous() and b_TE.is_contiguous()
    ):
        return a_TE + b_TE
    return rows.add(a_TE, b_TE)


class Attention(nn.Module):
    """Project, rotate, attend, project back."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        q_width = spec.num_heads * spec.head_dim
        kv_width = spec.num_kv_heads * spec.head_dim
        self.wq = Linear(spec.width, q_width, bias=spec.qkv_bias)
        self.wk = Linear(spec.width, kv_width, bias=spec.qkv_bias)
        self.wv = Linear(spec.width, kv_width, bias=spec.qkv_bias)
        self.wo = Linear(q_width, spec.width, bias=spec.o_bias)
        self.q_norm = norm(spec.head_dim, spec) if spec.qk_norm else None
        self.k_norm = norm(spec.head_dim, spec) if spec.qk_norm else None

    def project(self, x_TE: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated ``q_THD`` and ``k_TKD``, and ``v_TKD``; ``rotary`` is this step's cos and sin."""
        # The head count is read off the projection: under tp it is the local one.
        q_THD, k_TKD, v_TKD = (
            y.unflatten(-1, (-1, self.head_dim))
            for y in multiply_each(x_TE, (self.wq, self.wk, self.wv))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        return rotate(q_THD, *rotary), rotate(k_TKD, *rotary), v_TKD

    def forward(self, out_THD: Tensor) -> Tensor:
        """What attention found, projected back: [T, E]."""
        return self.wo(out_THD.flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = Linear(spec.width, spec.mlp_width, bias=spec.mlp_bias)
        self.up = Linear(spec.width, spec.mlp_width, bias=spec.mlp_bias)
        self.down = Linear(spec.mlp_width, spec.width, bias=spec.mlp_bias)

    def forward(self, x_TE: Tensor) -> Tensor:
        """MLP output [T, E] of the normed input."""
        return self.down(gate(x_TE, self.gate, self.up))


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attn_norm = norm(spec.width, spec)
        self.attn = Attention(spec)
        self.mlp_norm = norm(spec.width, spec)
        self.mlp = MLP(spec)

    def project(
        self, hidden_TE: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What this layer hands to attention: ``q_THD``, ``k_TKD`` and ``v_TKD``."""
        return self.attn.project(self.attn_norm(hidden_TE), rotary)

    def finish(self, hidden_TE: Tensor, out_THD: Tensor, feed_forward: FeedForward) -> Tensor:
        """The residual stream after this layer, [T, E], once attention has given ``out_THD``."""
        hidden_TE = add(hidden_TE, self.attn(out_THD))
        del out_THD  # its memory serves the MLP
        return add(hidden_TE, feed_forward(self.mlp, self.mlp_norm(hidden_TE)))

    def forward(
        self, hidden_TE: Tensor, rotary: tuple[Tensor, Tensor], layer: int, attend: Attend
    ) -> Tensor:
        """The residual stream after this layer, [T, E]."""
        # no name here: what attention gave lives until its projection
        return self.finish(
            hidden_TE, attend(layer, *self.project(hidden_TE, rotary)), attend.feed_forward
        )


class Unembed(nn.Module):
    """Logits from hidden states; the weight arrives, because a tied one is the embedding's."""

    def forward(self, hidden_BE: Tensor, weight_VE: Tensor) -> Tensor:
        """Logits [B, V], float32 or wider; see ``Decoder.logits``."""
        wide = torch.promote_types(hidden_BE.dtype, torch.float32)
        if hidden_BE.is_cuda and hidden_BE.dtype != wide:
            return torch.mm(hidden_BE, weight_VE.t(), out_dtype=wide)
        return multiply(hidden_BE, weight_VE).to(wide)
