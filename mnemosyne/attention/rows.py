"""Which rows of a step several groups have to do with, and where they stand on each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBatch


@dataclass(frozen=True, slots=True, eq=False)
class SharedRows:
    """The rows of a step that more than one group computes.

    Every group counts the shared rows of the whole step in the same order; a group that does not
    take part in one contributes an empty partial, so that one collective serves them all.
    """

    num_rows: int  # shared rows of the step, over all groups
    local_rows: Tensor  # int64, the rows of this rank among them
    exchange_rows: Tensor  # int64, where these stand in the common order
    batch: AttentionBatch  # what they see here; other rows of the step are padding in it

    def to(self, device: torch.device) -> SharedRows:
        rows = self.local_rows.to(device), self.exchange_rows.to(device)
        return SharedRows(self.num_rows, *rows, self.batch)


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
