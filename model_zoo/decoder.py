"""The decoder: all layers of a model, or the run of them that one pipeline stage holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mnemosyne.model_zoo.experts import SparseMLP
from mnemosyne.model_zoo.layers import MLP, DecoderLayer, Embedding, Linear, RMSNorm, Unembed
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.model_zoo.stored import Source
from mnemosyne.model_zoo.tensors import known_name, parameter_sources, tensor_shapes
from mnemosyne.model_zoo.turns import Tables, TurnTable
from mnemosyne.operators import TORCH, Operators
from mnemosyne.step_context import StepContext


class Decoder(nn.Module):
    """A decoder over packed tokens, for inference only: no parameter asks for a gradient.

    Args:
        spec: sizes and switches.
        layers: consecutive layers to hold; None is all. The embedding comes with layer 0, the
            final norm and the head with the last layer.
        dtype: dtype of parameters and activations.
        device: where the parameters are allocated, unset; ``"meta"`` allocates nothing.
        operators: what computes all but attention.
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        layers: range | None = None,
        dtype: torch.dtype,
        device: torch.device | str,
        operators: Operators = TORCH,
    ) -> None:
        super().__init__()
        every = range(spec.num_layers)
        held = every if layers is None else layers
        assert held.step == 1
        assert held[0] in every
        assert held[-1] in every
        self.spec = spec
        self.width = spec.width
        self.dtype = dtype
        self.operators = operators
        self.is_sharded = False  # whether modules meet other ranks: parallelize sets it
        self.is_first = held[0] == 0
        self.is_last = held[-1] == every[-1]
        self._turns = TurnTable(spec, held)
        # On the meta device modules initialise nothing: values come from a file or a seed.
        with torch.device("meta"):
            self._build()
        self.to(dtype).to_empty(device=device).requires_grad_(False)

    def _build(self) -> None:
        spec, operators = self.spec, self.operators
        self.embed: nn.Module | None = None
        if self.is_first:
            self.embed = Embedding(spec, operators)
        # Keyed by the index in the whole model: parameter names are the same on every stage.
        self.layers = nn.ModuleDict(
            {
                str(index): DecoderLayer(spec, operators, index, turns, self._mlp(index))
                for index, turns in self._turns.by_layer.items()
            }
        )
        self.norm = RMSNorm(spec.width, spec, operators) if self.is_last else None
        # A tied head far from its embedding owns a copy of it.
        owns_head = self.is_last and not (spec.tied and self.is_first)
        self.head: nn.Module | None = None
        if owns_head:
            self.head = Linear(spec.width, spec.vocab_size, operators, bias=False)
        self.unembed = Unembed(spec, operators)

    def _mlp(self, layer: int) -> nn.Module:
        if self.spec.is_sparse(layer):
            return SparseMLP(self.spec, self.operators)
        return MLP(self.spec, self.operators, self.spec.dense_width)

    def forward(self, x: Tensor, positions_T: Tensor, context: StepContext) -> Tensor:
        """Run the held layers over the packed tokens of a step.

        Args:
            x: token ids, int64 [T], on the first stage; hidden states [T, E] on the others.
            positions_T: position of each row in its own sequence, int64 [T].
            context: what attends, called with the layer's index among those held, and what runs
                MLPs.

        Returns:
            ``hidden_TE``, after the final norm on the last stage.
        """
        hidden_TE, tables = self.enter(x), self.rotary(positions_T)
        for index, layer in enumerate(self.layers.values()):
            hidden_TE = layer(hidden_TE, tables, index, context)
        return self.leave(hidden_TE)

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers held here, in order."""
        return [layer for layer in self.layers.values() if isinstance(layer, DecoderLayer)]

    def enter(self, x: Tensor) -> Tensor:
        """The input of the first layer held: embeddings, on the first stage."""
        return x if self.embed is None else self.embed(x)

    def rotary(self, positions_T: Tensor) -> Tables:
        """Cos and sin of a step's positions, for all layers."""
        return self._turns.tables(positions_T, self.dtype, self.operators)

    def leave(self, hidden_TE: Tensor) -> Tensor:
        """The output of the last layer held: normed, on the last stage."""
        return hidden_TE if self.norm is None else self.norm(hidden_TE)

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits [B, V] of chosen rows of the last stage's output.

        Returns:
            float32; float64 for a float64 model. On CUDA a half-precision product is written in
            float32 as it was accumulated. The CPU has no such product, and a float32 copy of the
            head takes several times as long as the whole product: there the logits carry the
            rounding of the model's dtype.
        """
        assert self.is_last
        owner = self.embed if self.head is None else self.head
        assert owner is not None
        return self.unembed(hidden_BE, owner.get_parameter("weight"))

    def sources(self) -> dict[str, Source]:
        """The source of each parameter held here in a checkpoint, by our name."""
        known = parameter_sources(self.spec)
        return {name: known[name] for name, _ in self.named_parameters()}

    def known_name(self, stored: str) -> str | None:
        """The name here of a stored tensor; None for one that the model does not use."""
        return known_name(self.spec, stored)

    def checkpoint_names(self) -> dict[str, str]:
        """Hugging Face name of each parameter held here, by our name."""
        return {name: source.name for name, source in self.sources().items()}

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the whole model, whichever layers are held here."""
        return tensor_shapes(self.spec)
