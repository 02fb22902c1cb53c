"""Attention of rows whose keys several groups hold: partials are exchanged and merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mnemosyne.attention.lse import merge_partials, with_sink
from mnemosyne.attention.shared_rows import SharedRows
from mnemosyne.parallel.collectives import Gather, start_all_gather
from mnemosyne.parallel.mesh import Axis


def pack_partials(out_THD: Tensor, lse_TH: Tensor, shared: SharedRows) -> Tensor:
    """Outputs and LSE of this rank's shared rows in one buffer, so that one message carries both.

    Args:
        out_THD: local partial outputs.
        lse_TH: their natural-log LSE, float32 (float64 for float64 outputs).
        shared: which rows to send.

    Returns:
        ``[num_rows, H, D + w]`` in the dtype of ``out_THD``: the LSE lies bit for bit in the last
        w elements. Rows this rank does not have hold (0, -inf).
    """
    num_heads, head_dim = out_THD.shape[1:]
    lse_width = lse_TH.dtype.itemsize // out_THD.dtype.itemsize
    packed = out_THD.new_zeros(shared.num_rows, num_heads, head_dim + lse_width)
    empty = lse_TH.new_full((1,), -torch.inf).view(out_THD.dtype)
    packed[..., head_dim:] = empty
    packed[shared.exchange_rows, :, :head_dim] = out_THD[shared.local_rows]
    lse = lse_TH[shared.local_rows].unsqueeze(-1).view(out_THD.dtype)
    packed[shared.exchange_rows, :, head_dim:] = lse
    return packed


def merge_packed(
    packed_RTHX: Tensor, shared: SharedRows, head_dim: int, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's shared rows over the keys of all groups.

    Args:
        packed_RTHX: what ``pack_partials`` gave on each group, in the order of groups.
        shared: which rows are this rank's.
        head_dim: D.
        wide: dtype of the LSE.

    Returns:
        ``[local rows, H, D]`` in the dtype of the packed outputs, and their LSE.
    """
    mine = packed_RTHX[:, shared.exchange_rows]
    lse = mine[..., head_dim:].contiguous().view(wide).squeeze(-1)
    return merge_partials(mine[..., :head_dim], lse)


class Pending(Protocol):
    """An exchange that was started."""

    def finish(self, out_THD: Tensor, sink_H: Tensor | None = None) -> None:
        """See ``Exchange.finish``."""


StartExchange = Callable[[Tensor, Tensor, SharedRows, Axis], Pending]  # as ``start_exchange``


@dataclass(frozen=True, slots=True, eq=False)
class Exchange:
    """Partials of the shared rows of a step, on their way between the groups."""

    gather: Gather
    shared: SharedRows
    head_dim: int
    wide: torch.dtype  # of the LSE

    def finish(self, out_THD: Tensor, sink_H: Tensor | None = None) -> None:
        """Write attention of the shared rows over all their keys, once the partials have come.

        Args:
            out_THD: the outputs of the step; shared rows are overwritten.
            sink_H: see ``with_sink``.
        """
        merged, lse = merge_packed(self.gather.wait(), self.shared, self.head_dim, self.wide)
        out_THD[self.shared.local_rows] = (
            merged if sink_H is None else with_sink(merged, lse, sink_H)
        )


def start_exchange(out_THD: Tensor, lse_TH: Tensor, shared: SharedRows, axis: Axis) -> Exchange:
    """Send the partials of the shared rows to all groups, and start to receive theirs.

    The volume per layer and group is shared rows x heads x (D + 1), whatever the context. All
    groups must call this in a step that has shared rows, those without any of them too.

    Args:
        out_THD: local outputs; used before this returns.
        lse_TH: natural-log LSE of the local outputs.
        shared: the shared rows of the step.
        axis: kvp.
    """
    gather = start_all_gather(pack_partials(out_THD, lse_TH, shared), axis)
    return Exchange(gather, shared, out_THD.shape[-1], lse_TH.dtype)
