"""The rows of a step that several groups attend to, and their places on each."""

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
