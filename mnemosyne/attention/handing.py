"""Keys and values of a slice, handed to the other groups of its prompt layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mnemosyne.parallel.collectives import Message, start_message
from mnemosyne.parallel.mesh import Axis


@dataclass(frozen=True, slots=True, eq=False)
class Handed:
    """The rows of one slice, on their way between this group and another."""

    request_id: int
    start: int  # position of the first row
    peer: int  # the other group
    slots_T: Tensor  # int64, where they lie in the pool of this rank
    is_needed: bool = False  # of those that come: whether later rows of this step see them


@dataclass(frozen=True, slots=True, eq=False)
class HandedRows:
    """Slices that leave a group in a step and those that come, both in the order of the plan."""

    sent: tuple[Handed, ...]
    received: tuple[Handed, ...]


@dataclass(slots=True, eq=False)
class Handing:
    """The exchange of handed rows in one forward pass.

    Keys and values are taken from the pool, rotated as they stand there, and written to that of
    the receiver. Rows that no row of this step sees come in behind the computation of the layer.

    Args:
        rows: of the step.
        pools: keys and values of the local layers, ``[K, S, D]`` each.
        axis: kvp.
    """

    rows: HandedRows
    pools: Sequence[tuple[Tensor, Tensor]]
    axis: Axis
    _sums: list[Tensor] = field(init=False)  # of all that came, by slice
    _layer: int = 0  # that messages are under way for
    _sent: list[Message] = field(default_factory=list)
    _received: dict[int, Message] = field(default_factory=dict)  # by slice

    def __post_init__(self) -> None:
        first = self.pools[0][0]
        wide = torch.promote_types(first.dtype, torch.float32)
        self._sums = [first.new_zeros((), dtype=wide) for _ in self.rows.received]

    def start(self, layer: int) -> None:
        """Hand on the rows of a layer, which the pool has now; wait for those that are needed."""
        self.finish()
        self._layer = layer
        for handed in self.rows.sent:
            self._sent.append(start_message(self._pack(handed), self.axis, to=handed.peer))
        for index, handed in enumerate(self.rows.received):
            message = start_message(self._empty(handed), self.axis, of=handed.peer)
            self._received[index] = message
        for index, handed in enumerate(self.rows.received):
            if handed.is_needed:
                self._take(index)

    def finish(self) -> None:
        """Take whatever else comes of the layer at hand; at its end nothing is under way."""
        for index in list(self._received):
            self._take(index)
        for message in self._sent:
            message.wait()
        self._sent = []

    def broken(self) -> list[Handed]:
        """Slices of others of which keys or values are not finite; after the last layer."""
        if not self._sums:
            return []
        is_finite = torch.stack(self._sums).isfinite().tolist()
        return [h for h, whole in zip(self.rows.received, is_finite, strict=True) if not whole]

    def _pack(self, handed: Handed) -> Tensor:
        k_KSD, v_KSD = self.pools[self._layer]
        packed = self._empty(handed)
        torch.index_select(k_KSD, 1, handed.slots_T, out=packed[0])
        torch.index_select(v_KSD, 1, handed.slots_T, out=packed[1])
        return packed

    def _empty(self, handed: Handed) -> Tensor:
        """Room for the keys and values of a slice, ``[2, K, T, D]``."""
        num_heads, _, head_dim = self.pools[self._layer][0].shape
        return self.pools[self._layer][0].new_empty(2, num_heads, len(handed.slots_T), head_dim)

    def _take(self, index: int) -> None:
        """Wait for a slice and write it to the pool."""
        handed, (k_KSD, v_KSD) = self.rows.received[index], self.pools[self._layer]
        came = self._received.pop(index).wait()
        k_KSD.index_copy_(1, handed.slots_T, came[0])
        v_KSD.index_copy_(1, handed.slots_T, came[1])
        self._sums[index] += came.sum(dtype=self._sums[index].dtype)  # nan or inf for good
