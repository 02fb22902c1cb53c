"""The MLP of a step: over the rows of this rank, or over those of all groups that share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mnemosyne.parallel.collectives import all_gather
from mnemosyne.parallel.mesh import Axis

Mlp = Callable[[Tensor], Tensor]  # [T, E] to [T, E], row by row
FeedForward = Callable[[Mlp, Tensor], Tensor]  # an MLP, and its input


@dataclass(frozen=True, slots=True, eq=False)
class WideRows:
    """How the rows of all groups meet in an MLP that is sharded over kvp and tp together.

    Each row is sent by its owner, the group of its request's first shard; every group computes
    its part of the MLP for all rows and keeps those it has.
    """

    num_sent: int  # rows that each group sends, padded to the same number
    owned_rows: Tensor  # int64, local rows that this group sends
    local_rows: Tensor  # int64, local rows that are no padding
    gathered_rows: Tensor  # int64, where these stand in the rows of all groups

    def to(self, device: torch.device) -> WideRows:
        return WideRows(
            self.num_sent,
            self.owned_rows.to(device),
            self.local_rows.to(device),
            self.gathered_rows.to(device),
        )


def feed_forward_over(rows: WideRows | None, axis: Axis) -> FeedForward:
    """How the layers of a step run their MLPs.

    Args:
        rows: None where no group shares the MLP with another.
        axis: kvp.
    """
    return own_rows if rows is None else partial(wide_feed_forward, rows=rows, axis=axis)


def own_rows(mlp: Mlp, x_TE: Tensor) -> Tensor:
    """The MLP over the rows of this rank alone."""
    return mlp(x_TE)


def wide_feed_forward(mlp: Mlp, x_TE: Tensor, *, rows: WideRows, axis: Axis) -> Tensor:
    """The MLP over the rows of all groups; each MLP weight is read once over all ranks.

    Args:
        mlp: sums its result over the flattened (kvp, tp).
        x_TE: local rows.
        rows: which of them to send and to take back.
        axis: kvp.

    Returns:
        ``[T, E]``; padding rows are 0.

    Source: Helix parallelism, arXiv 2507.07120.
    """
    sent = x_TE.new_zeros(rows.num_sent, x_TE.shape[1])
    sent[: len(rows.owned_rows)] = x_TE[rows.owned_rows]
    y_RE = mlp(all_gather(sent, axis).flatten(0, 1))
    out_TE = torch.zeros_like(x_TE)
    out_TE[rows.local_rows] = y_RE[rows.gathered_rows]
    return out_TE
