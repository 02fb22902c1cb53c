"""The pieces of a decoder layer: mathematics, whose operators and inputs arrive as arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.attention.segments import Attend
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.operators import Operators, Rotary, Weights

FeedForward = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]  # an MLP and its input
Projections = tuple[Tensor, Tensor, Tensor]  # q_THD, k_TKD and v_TKD


class Embedding(nn.Embedding):
    """``nn.Embedding`` by a set of operators."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__(spec.vocab_size, spec.width)
        self.operators = operators

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight, [T, E]."""
        return self.operators.embed(ids_T, self.weight)


class Linear(nn.Linear):
    """``nn.Linear`` by a set of operators; layers of one input may be multiplied in one call."""

    def __init__(
        self, num_inputs: int, num_outputs: int, operators: Operators, *, bias: bool
    ) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)
        self.operators = operators
        self.is_hooked = False

    @property
    def weights(self) -> Weights:
        """Weight and bias."""
        return self.weight, self.bias

    def forward(self, x_TE: Tensor) -> Tensor:
        """``x W^T + b``."""
        return self.operators.linear(x_TE, (self.weights,))[0]

    def register_forward_hook(self, *arguments: Any, **keywords: Any) -> Any:
        """As of any module; the layer is then called by itself."""
        self.is_hooked = True
        return super().register_forward_hook(*arguments, **keywords)

    def register_forward_pre_hook(self, *arguments: Any, **keywords: Any) -> Any:
        """As of any module; the layer is then called by itself."""
        self.is_hooked = True
        return super().register_forward_pre_hook(*arguments, **keywords)


def are_plain(layers: Sequence[nn.Module]) -> bool:
    """Whether layers do what their weights say: nothing is attached to them or in their place."""
    return all(type(layer) is Linear and not layer.is_hooked for layer in layers)


class _Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, width: int, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = spec.norm_eps
        self.operators = operators


class RMSNorm(_Norm):
    """RMSNorm over the last dim; it is computed in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        """The normed input."""
        return self.operators.rms_norm(x, self.weight, self.eps)


class AddRMSNorm(_Norm):
    """RMSNorm of a residual stream once something is added to it."""

    def forward(self, hidden_TE: Tensor, delta_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and the sum normed; both [T, E]."""
        return self.operators.add_rms_norm(hidden_TE, delta_TE, self.weight, self.eps)


class Attention(nn.Module):
    """Project, rotate, attend, project back."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.head_dim = spec.head_dim
        q_width = spec.num_heads * spec.head_dim
        kv_width = spec.num_kv_heads * spec.head_dim
        self.wq = Linear(spec.width, q_width, operators, bias=spec.qkv_bias)
        self.wk = Linear(spec.width, kv_width, operators, bias=spec.qkv_bias)
        self.wv = Linear(spec.width, kv_width, operators, bias=spec.qkv_bias)
        self.wo = Linear(q_width, spec.width, operators, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec, operators) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec, operators) if spec.qk_norm else None

    def project(self, x_TE: Tensor) -> Projections:
        """``q_THD``, ``k_TKD`` and ``v_TKD``, not rotated yet."""
        layers = self.wq, self.wk, self.wv
        if are_plain(layers):
            projected = self.operators.linear(x_TE, [layer.weights for layer in layers])
        else:
            projected = [layer(x_TE) for layer in layers]
        # The head count is read off the projection: under tp it is the local one.
        q_THD, k_TKD, v_TKD = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if self.q_norm is not None and self.k_norm is not None:
            q_THD, k_TKD = self.q_norm(q_THD), self.k_norm(k_TKD)
        return q_THD, k_TKD, v_TKD

    def forward(self, out_THD: Tensor) -> Tensor:
        """What attention found, projected back: [T, E]."""
        return self.wo(out_THD.flatten(1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.gate = Linear(spec.width, spec.mlp_width, operators, bias=spec.mlp_bias)
        self.up = Linear(spec.width, spec.mlp_width, operators, bias=spec.mlp_bias)
        self.down = Linear(spec.mlp_width, spec.width, operators, bias=spec.mlp_bias)

    def widen(self, x_TE: Tensor) -> Tensor:
        """``silu(gate(x)) * up(x)``, [T, F]."""
        gate, up = self.gate, self.up
        if are_plain((gate, up)):
            return self.operators.gated(x_TE, gate.weights, up.weights)
        return F.silu(gate(x_TE)) * up(x_TE)

    def forward(self, x_TE: Tensor) -> Tensor:
        """MLP output [T, E] of the normed input."""
        return self.down(self.widen(x_TE))


class DecoderLayer(nn.Module):
    """Attention and MLP, each on a normed copy of the residual stream."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.attn_norm = RMSNorm(spec.width, spec, operators)
        self.attn = Attention(spec, operators)
        self.mlp_norm = AddRMSNorm(spec.width, spec, operators)
        self.mlp = MLP(spec, operators)

    def project(self, hidden_TE: Tensor) -> Projections:
        """What this layer hands to attention, not rotated yet."""
        return self.attn.project(self.attn_norm(hidden_TE))

    def finish(self, hidden_TE: Tensor, out_THD: Tensor, feed_forward: FeedForward) -> Tensor:
        """The residual stream after this layer, [T, E], once attention has given ``out_THD``."""
        delta_TE = self.attn(out_THD)
        del out_THD  # its memory serves the MLP
        hidden_TE, x_TE = self.mlp_norm(hidden_TE, delta_TE)
        del delta_TE
        return self.operators.add(hidden_TE, feed_forward(self.mlp, x_TE))

    def forward(self, hidden_TE: Tensor, rotary: Rotary, layer: int, attend: Attend) -> Tensor:
        """The residual stream after this layer, [T, E]."""
        # no name here: what attention gave lives until its projection
        return self.finish(
            hidden_TE, attend(layer, *self.project(hidden_TE), rotary), attend.feed_forward
        )


class Unembed(nn.Module):
    """Logits from hidden states; the weight arrives, because a tied one is the embedding's."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

    def forward(self, hidden_BE: Tensor, weight_VE: Tensor) -> Tensor:
        """Logits [B, V], float32 or wider; see ``Decoder.logits``."""
        return self.operators.logits(hidden_BE, weight_VE)
