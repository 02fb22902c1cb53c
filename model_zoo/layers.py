"""The pieces of a decoder layer: mathematics, whose operators and inputs arrive as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.model_zoo.turns import Tables, Turns
from mnemosyne.operators import Operators, Rotary, Weights, activate
from mnemosyne.parallel.feed_forward import FeedForward
from mnemosyne.step_context import StepContext

Projections = tuple[Tensor, Tensor, Tensor]  # q_THD, k_TKD and v_TKD


class Embedding(nn.Embedding):
    """``nn.Embedding`` by a set of operators, times a factor."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__(spec.vocab_size, spec.width)
        self.operators = operators
        self.scale = spec.embed_scale

    def look_up(self, ids_T: Tensor, weight_VE: Tensor) -> Tensor:
        """Rows of a weight, which may be a part of this one's, [T, E]."""
        x_TE = self.operators.embed(ids_T, weight_VE)
        if self.scale == 1:
            return x_TE
        return x_TE * float(torch.tensor(self.scale, dtype=x_TE.dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        """Rows of the weight, [T, E]."""
        return self.look_up(ids_T, self.weight)


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
    """Return whether layers are plain: nothing is attached to them or stands in their place."""
    return all(type(layer) is Linear and not layer.is_hooked for layer in layers)


class _Norm(nn.Module):
    """The weight of an RMSNorm."""

    def __init__(self, width: int, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = spec.norm_eps
        self.offset = spec.norm_offset
        self.operators = operators


class RMSNorm(_Norm):
    """RMSNorm over the last dim; it is computed in float32 or wider."""

    def forward(self, x: Tensor) -> Tensor:
        """The normed input."""
        return self.operators.rms_norm(x, self.weight, self.eps, self.offset)


class AddRMSNorm(_Norm):
    """RMSNorm of a residual stream once something is added to it."""

    def forward(self, hidden_TE: Tensor, delta_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, and the sum normed; both [T, E]."""
        return self.operators.add_rms_norm(hidden_TE, delta_TE, self.weight, self.eps, self.offset)


class Add(nn.Module):
    """A stand-in for ``AddRMSNorm`` where nothing is normed."""

    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.operators = operators

    def forward(self, hidden_TE: Tensor, delta_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The sum, twice."""
        total_TE = self.operators.add(hidden_TE, delta_TE)
        return total_TE, total_TE


class Sinks(nn.Module):
    """A logit per query head that takes a share of attention and gives nothing."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads))


class Attention(nn.Module):
    """Project, rotate, attend, project back."""

    def __init__(self, spec: ModelSpec, operators: Operators, layer: int) -> None:
        super().__init__()
        self.operators = operators
        self.head_dim = spec.head_dim
        q_width = spec.num_heads * spec.head_dim
        kv_width = spec.num_kv_heads * spec.head_dim
        self.wq = Linear(spec.width, q_width, operators, bias=spec.qkv_bias)
        self.wk = Linear(spec.width, kv_width, operators, bias=spec.qkv_bias)
        self.wv = Linear(spec.width, kv_width, operators, bias=spec.qkv_bias)
        self.wo = Linear(q_width, spec.width, operators, bias=spec.o_bias)
        self.norms_rows = spec.qk_norm_over == "row"
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if spec.has_qk_norm(layer):
            widths = (q_width, kv_width) if self.norms_rows else (spec.head_dim,) * 2
            self.q_norm, self.k_norm = (RMSNorm(width, spec, operators) for width in widths)
        self.sinks = Sinks(spec.num_heads) if spec.has_sinks else None
        self.post_norm = norm_after(spec, operators)

    def project(self, x_TE: Tensor) -> Projections:
        """``q_THD``, ``k_TKD`` and ``v_TKD``, not rotated yet."""
        layers = self.wq, self.wk, self.wv
        if are_plain(layers):
            projected = self.operators.linear(x_TE, [layer.weights for layer in layers])
        else:
            projected = [layer(x_TE) for layer in layers]
        if self.norms_rows:
            projected = *self._normed(*projected[:2]), projected[2]
        # The head count is read off the projection: under tp it is the local one.
        q_THD, k_TKD, v_TKD = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)
        if not self.norms_rows:
            q_THD, k_TKD = self._normed(q_THD, k_TKD)
        return q_THD, k_TKD, v_TKD

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys over their last dim, where they are normed."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)

    def forward(self, out_THD: Tensor) -> Tensor:
        """Project the output of attention back: [T, E]."""
        delta_TE = self.wo(out_THD.flatten(1))
        return delta_TE if self.post_norm is None else self.post_norm(delta_TE)


class MLP(nn.Module):
    """A gated MLP: down(activation(gate(x)) * up(x)), with silu SwiGLU.

    Args:
        spec: switches.
        operators: what computes it.
        mlp_width: F.
        is_part: whether something is added to it before the norm that may follow.
    """

    def __init__(
        self, spec: ModelSpec, operators: Operators, mlp_width: int, *, is_part: bool = False
    ) -> None:
        super().__init__()
        self.operators = operators
        self.activation = spec.activation
        self.gate = Linear(spec.width, mlp_width, operators, bias=spec.mlp_bias)
        self.up = Linear(spec.width, mlp_width, operators, bias=spec.mlp_bias)
        self.down = Linear(mlp_width, spec.width, operators, bias=spec.mlp_bias)
        self.post_norm = None if is_part else norm_after(spec, operators)

    def widen(self, x_TE: Tensor) -> Tensor:
        """``activation(gate(x)) * up(x)``, [T, F]."""
        gate, up = self.gate, self.up
        if are_plain((gate, up)):
            return self.operators.gated(x_TE, gate.weights, up.weights, self.activation)
        return activate(gate(x_TE), up(x_TE), self.activation)

    def narrow(self, wide_TF: Tensor) -> Tensor:
        """Project the output of ``widen`` back: [T, E]."""
        delta_TE = self.down(wide_TF)
        return delta_TE if self.post_norm is None else self.post_norm(delta_TE)

    def forward(self, x_TE: Tensor) -> Tensor:
        """MLP output [T, E] of the normed input."""
        return self.narrow(self.widen(x_TE))


def norm_after(spec: ModelSpec, operators: Operators) -> RMSNorm | None:
    """The norm of the output of attention or MLP, if there is one."""
    return None if spec.norms == "before" else RMSNorm(spec.width, spec, operators)


class DecoderLayer(nn.Module):
    """Attention and MLP, each added to the residual stream.

    Args:
        spec: sizes and switches.
        operators: what computes it.
        layer: its index in the whole model.
        turns: which of a step's rotary tables turn its queries and its keys; None turns nothing.
        mlp: what follows attention, of one MLP or of experts.
    """

    def __init__(
        self, spec: ModelSpec, operators: Operators, layer: int, turns: Turns, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.operators = operators
        self.turns = turns
        self.attn_norm: nn.Module | None = None
        self.mlp_norm: nn.Module = Add(operators)
        if spec.norms != "after":
            self.attn_norm = RMSNorm(spec.width, spec, operators)
            self.mlp_norm = AddRMSNorm(spec.width, spec, operators)
        self.attn = Attention(spec, operators, layer)
        self.mlp: Any = mlp

    @property
    def meets_ranks(self) -> bool:
        """Return whether ranks that share the rows of q and k norm them together."""
        return self.attn.norms_rows and not isinstance(self.attn.q_norm, RMSNorm)

    @property
    def sink_H(self) -> Tensor | None:
        """Logits of its sinks, if it has any; under tp those of the local heads."""
        return None if self.attn.sinks is None else self.attn.sinks.weight

    @property
    def is_sparse(self) -> bool:
        """Return whether its MLP is one of experts."""
        return not isinstance(self.mlp, MLP)

    @property
    def kind(self) -> Turns:
        """The parts of its graph that are not told by the shapes of its parameters."""
        return self.turns

    def project(self, hidden_TE: Tensor) -> Projections:
        """The projections that this layer hands to attention, not rotated yet."""
        return self.attn.project(hidden_TE if self.attn_norm is None else self.attn_norm(hidden_TE))

    def turned(
        self, projections: Projections, tables: Tables
    ) -> tuple[Tensor, Tensor, Tensor, Rotary | None]:
        """Projections as attention takes them, and the angles that it has yet to turn q and k by.

        One table for both is left to attention, which turns and stores in one call.
        """
        at_q, at_k = self.turns
        if at_q == at_k:
            return *projections, None if at_q is None else tables[at_q]
        return *self.all_turned(projections, tables), None

    def all_turned(self, projections: Projections, tables: Tables) -> Projections:
        """Projections with nothing left to turn."""
        (q_THD, k_TKD, v_TKD), rotate = projections, self.operators.rotate
        at_q, at_k = self.turns
        return (
            q_THD if at_q is None else rotate(q_THD, *tables[at_q]),
            k_TKD if at_k is None else rotate(k_TKD, *tables[at_k]),
            v_TKD,
        )

    def finish(self, hidden_TE: Tensor, out_THD: Tensor, feed_forward: FeedForward) -> Tensor:
        """The residual stream after this layer, [T, E], once attention has given ``out_THD``."""
        delta_TE = self.attn(out_THD)
        del out_THD  # its memory serves the MLP
        hidden_TE, x_TE = self.mlp_norm(hidden_TE, delta_TE)
        del delta_TE
        return self.operators.add(hidden_TE, feed_forward(self.mlp, x_TE))

    def forward(
        self, hidden_TE: Tensor, tables: Tables, layer: int, context: StepContext
    ) -> Tensor:
        """The residual stream after this layer, [T, E]."""
        # no names here: the output of attention lives until its projection
        return self.finish(
            hidden_TE,
            context.attend(
                layer, *self.turned(self.project(hidden_TE), tables), sink_H=self.sink_H
            ),
            context.feed_forward,
        )


class Unembed(nn.Module):
    """Logits from hidden states; the weight arrives, because a tied one is the embedding's."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.cap = spec.logit_cap

    def forward(self, hidden_BE: Tensor, weight_VE: Tensor) -> Tensor:
        """Logits [B, V], float32 or wider; see ``Decoder.logits``."""
        logits_BV = self.operators.logits(hidden_BE, weight_VE)
        return logits_BV if self.cap is None else self.cap * (logits_BV / self.cap).tanh()
