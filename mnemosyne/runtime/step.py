"""The contract of runtime and model, and the attention that its layers call in one step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from mnemosyne.attention.chunked import Reach, prepare
from mnemosyne.attention.handing import Handing
from mnemosyne.attention.kvp import StartExchange, start_exchange
from mnemosyne.attention.lse import with_sink
from mnemosyne.attention.segments import AttentionBackend, AttentionBatch
from mnemosyne.cache.pages import PagePool
from mnemosyne.operators import Operators, Rotary
from mnemosyne.parallel.feed_forward import FeedForward
from mnemosyne.parallel.mesh import Axis
from mnemosyne.runtime.inputs import StepInputs
from mnemosyne.step_context import StepContext

Projections = tuple[Tensor, Tensor, Tensor]
Tables = tuple[Rotary, ...]
Place = tuple[int, Reach]  # a track of layers, and what they see


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The numbers of a model that the attention of the local layers needs."""

    windows: Sequence[Reach]  # per local layer
    scale: float


def sights(pool: PagePool, layers: LayerShape) -> set[Place]:
    """Every track, with what layers in it see."""
    return set(zip(pool.tracks, layers.windows, strict=True))


class Model(Protocol):
    """The methods of a decoder that the runtime needs; it arrives as an argument."""

    def __call__(self, x: Tensor, positions_T: Tensor, context: StepContext) -> Tensor:
        """Hidden states ``[T, E]`` of the packed rows."""

    def logits(self, hidden_BE: Tensor) -> Tensor:
        """Logits ``[B, V]``, float32 or wider."""


class MLP(Protocol):
    """The MLP of a layer, cut before its last product."""

    def narrow(self, wide_TF: Tensor) -> Tensor:
        """The last product, and what follows it."""

    def widen(self, x_TE: Tensor) -> Tensor:
        """The input of the last product."""

    def __call__(self, x_TE: Tensor) -> Tensor:
        """All of it."""


class Layer(Protocol):
    """One layer of a decoder, cut at its attention and wherever it meets other ranks."""

    @property
    def operators(self) -> Operators:
        """The operators that compute it."""

    @property
    def attn(self) -> Callable[[Tensor], Tensor]:
        """Projects back what attention gave."""

    @property
    def mlp_norm(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Adds to the residual stream; the sum, and the sum normed."""

    @property
    def mlp(self) -> MLP:
        """Takes the normed sum."""

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """Its parameters, by name."""

    @property
    def meets_ranks(self) -> bool:
        """Return whether it meets other ranks on the way to attention."""

    @property
    def sink_H(self) -> Tensor | None:
        """Logits of its sinks; see ``Attend``."""

    @property
    def is_sparse(self) -> bool:
        """Return whether its MLP is one of experts, which is called as a whole."""

    @property
    def kind(self) -> Hashable:
        """The parts of a layer's graph that are not told by the shapes of its parameters."""

    def project(self, hidden_TE: Tensor) -> Projections:
        """``q_THD``, ``k_TKD`` and ``v_TKD`` of the residual stream, not rotated yet."""

    def all_turned(self, projections: Projections, tables: Tables) -> Projections:
        """Projections, rotated."""

    def finish(self, hidden_TE: Tensor, out_THD: Tensor, feed_forward: FeedForward) -> Tensor:
        """The residual stream after the layer, from what attention gave."""


class LayeredModel(Model, Protocol):
    """A decoder that can be run in pieces, and so compiled."""

    operators: Operators
    is_first: bool  # whether its input are ids
    is_last: bool  # whether it gives logits
    is_sharded: bool  # whether modules meet other ranks
    width: int  # E
    dtype: torch.dtype

    def decoder_layers(self) -> Sequence[Layer]:
        """The layers held here."""

    def enter(self, x: Tensor) -> Tensor:
        """The input of the first layer."""

    def rotary(self, positions_T: Tensor) -> Tables:
        """Cosines and sines of a step's positions, one pair for each way that layers turn."""

    def leave(self, hidden_TE: Tensor) -> Tensor:
        """The output of the last layer, normed."""


class PagedAttention:
    """Stores the K and V of a step in the pool and attends over it: the ``Attend`` of one step.

    Args:
        pool: the cache of this rank.
        backend: how attention is computed.
        operators: what rotates and stores.
        inputs: the rows of the step.
        layers: windows of the local layers and the scale of their scores.
        kvp: the groups among which the rows of long requests are shared.
        exchange: brings the partials of those rows together.
        handing: passes slices of prompts between the groups, if the step has any.
        backends: of each track, where they differ.
    """

    def __init__(
        self,
        pool: PagePool,
        backend: AttentionBackend,
        operators: Operators,
        inputs: StepInputs,
        *,
        layers: LayerShape,
        kvp: Axis,
        exchange: StartExchange = start_exchange,
        handing: Handing | None = None,
        backends: Sequence[AttentionBackend] | None = None,
    ) -> None:
        self._pool = pool
        self._tracks = inputs.tracks
        self._backends = backends or [backend] * len(self._tracks)
        self._operators = operators
        self._inputs = inputs
        self._layers = layers
        self._kvp = kvp
        self._start_exchange = exchange
        self._handing = handing
        device = inputs.slots_T.device
        self._prepared = self._prepare([rows.batch for rows in self._tracks], device)
        self._prepared_shared = self._prepare([rows.shared for rows in self._tracks], device)

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rotary: Rotary | None = None,
        sink_H: Tensor | None = None,
    ) -> Tensor:
        rows = self._tracks[self._pool.tracks[layer]]
        where = rows.slots_T, self._pool.k[layer], self._pool.v[layer]
        if rotary is None:
            self._operators.write(k_TKD, v_TKD, *where)
        else:
            q_THD = self._operators.rotate_and_write(q_THD, k_TKD, v_TKD, rotary, *where)
        if self._handing is not None:
            self._handing.start(layer)
        out_THD = self._attend_all(layer, q_THD, sink_H)
        if rows.moves is not None:
            self._pool.move(layer, *rows.moves)
        return out_THD

    def _attend_all(self, layer: int, q_THD: Tensor, sink_H: Tensor | None) -> Tensor:
        """Attention of all rows."""
        shared = self._inputs.shared
        if shared is None:
            return self._attend_own(layer, q_THD, sink_H)
        # Shared rows first: their partials travel while the other rows are computed.
        out_THD, lse_TH = self._attend(layer, q_THD, self._prepared_shared, return_lse=True)
        assert lse_TH is not None, "partials come with their LSE"
        exchange = self._start_exchange(out_THD, lse_TH, shared, self._kvp)
        if self._inputs.batch.segments:
            out_THD = self._attend_own(layer, q_THD, sink_H)
        exchange.finish(out_THD, sink_H)
        return out_THD

    def _attend_own(self, layer: int, q_THD: Tensor, sink_H: Tensor | None) -> Tensor:
        """Attention of the rows that no other group shares."""
        has_sink = sink_H is not None
        out_THD, lse_TH = self._attend(layer, q_THD, self._prepared, return_lse=has_sink)
        if sink_H is None:
            return out_THD
        assert lse_TH is not None, "a sink takes its share by the LSE"
        return with_sink(out_THD, lse_TH, sink_H)

    def _prepare(
        self, batches: Sequence[AttentionBatch | None], device: torch.device
    ) -> dict[Place, Any]:
        """The batches of all tracks as the backend prepares them, by what layers see."""
        return {
            (track, reach): prepare(self._backends[track], batch, reach, device)
            for track, reach in sights(self._pool, self._layers)
            if (batch := batches[track]) is not None
        }

    def _attend(
        self,
        layer: int,
        q_THD: Tensor,
        prepared: dict[Place, Any],
        *,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        track = self._pool.tracks[layer]
        return self._backends[track].attend(
            q_THD,
            self._pool.k[layer],
            self._pool.v[layer],
            prepared[track, self._layers.windows[layer]],
            scale=self._layers.scale,
            return_lse=return_lse,
        )
