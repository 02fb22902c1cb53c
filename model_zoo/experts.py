"""An MLP of many experts, of which each row is given to a few."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnemosyne.model_zoo.layers import MLP, Linear, norm_after
from mnemosyne.model_zoo.router import choose
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.operators import ExpertWeights, Operators


class ExpertRouter(nn.Module):
    """Chooses the experts of each row; see ``Router``.

    Its logits are float32 or wider, and neither the rows beside a row nor their number change them,
    because an expert that flips changes the answer.
    """

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.router = spec.router
        self.per_token = spec.experts_per_token
        num_experts = spec.num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, spec.width))
        self.bias = nn.Parameter(torch.empty(num_experts)) if spec.router.is_biased else None
        self.correction: nn.Parameter | None = None
        if spec.router.is_corrected:
            self.correction = nn.Parameter(torch.empty(num_experts))
        self.smallest_margin: Tensor | None = None  # seen so far

    def forward(self, x_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each row, int64 [T, C], and their weights in the dtype of the logits."""
        logits_TX = self.operators.route(x_TE, self.weight, self.bias)
        chosen = choose(logits_TX, self.router, self.per_token, self.correction)
        seen = self.smallest_margin
        self.smallest_margin = chosen.margin if seen is None else torch.minimum(seen, chosen.margin)
        return chosen.experts_TC, chosen.weights_TC


class Experts(nn.Module):
    """The experts of a layer, each an MLP, their weights stacked."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.activation = spec.activation
        self.weighs_input = spec.router.on_input
        num, wide, width = spec.num_experts, spec.mlp_width, spec.width
        self.gate = nn.Parameter(torch.empty(num, wide, width))
        self.up = nn.Parameter(torch.empty(num, wide, width))
        self.down = nn.Parameter(torch.empty(num, width, wide))
        self.gate_bias: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if spec.mlp_bias:
            self.gate_bias = nn.Parameter(torch.empty(num, wide))
            self.up_bias = nn.Parameter(torch.empty(num, wide))
            self.down_bias = nn.Parameter(torch.empty(num, width))

    def forward(self, x_TE: Tensor, experts_TC: Tensor, weights_TC: Tensor) -> Tensor:
        """The weighted sum over the experts of each row, [T, E]."""
        weights = ExpertWeights(
            *(self.gate, self.up, self.down), *(self.gate_bias, self.up_bias, self.down_bias)
        )
        return self.operators.experts(
            x_TE,
            experts_TC,
            weights_TC,
            weights,
            activation=self.activation,
            weighs_input=self.weighs_input,
        )


class SparseMLP(nn.Module):
    """Experts, and beside them an MLP that every row is given to, where a model has one."""

    def __init__(self, spec: ModelSpec, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.router = ExpertRouter(spec, operators)
        self.experts = Experts(spec, operators)
        self.shared: MLP | None = None
        self.shared_gate: Linear | None = None
        if spec.shared_width:
            self.shared = MLP(spec, operators, spec.shared_width, is_part=True)
            if spec.gates_shared:
                self.shared_gate = Linear(spec.width, 1, operators, bias=False)
        self.post_norm = norm_after(spec, operators)

    def forward(self, x_TE: Tensor) -> Tensor:
        """MLP output [T, E] of the normed input."""
        y_TE = self.experts(x_TE, *self.router(x_TE))
        if self.shared is not None:
            shared_TE = self.shared(x_TE)
            if self.shared_gate is not None:
                shared_TE = self.shared_gate(x_TE).sigmoid() * shared_TE
            y_TE = self.operators.add(y_TE, shared_TE)
        return y_TE if self.post_norm is None else self.post_norm(y_TE)
