"""The MLP of a step: every row once, whichever group sends it, and padding stays out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mnemosyne.parallel import feed_forward
from mnemosyne.parallel.feed_forward import WideRows, feed_forward_over, own_rows
from mnemosyne.parallel.mesh import Axis

KVP = Axis("kvp")


def test_an_mlp_that_no_group_shares_runs_over_the_rows_as_they_are() -> None:
    x_TE = torch.randn(3, 4)

    assert feed_forward_over(None, KVP) is own_rows
    assert own_rows(lambda rows: rows, x_TE) is x_TE


def test_a_shared_mlp_runs_over_the_rows_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TE = torch.tensor([[1.0], [2.0], [3.0], [9.0]])  # the last one is padding
    others = torch.tensor([[30.0], [0.0]])  # what the second group sends; it owns row 2 as well
    seen: list[Tensor] = []

    def mlp(rows_RE: Tensor) -> Tensor:
        seen.append(rows_RE)
        return 10 * rows_RE

    monkeypatch.setattr(feed_forward, "all_gather", lambda sent, axis: torch.stack([sent, others]))
    rows = WideRows(
        num_sent=2,
        owned_rows=torch.tensor([0, 1]),
        local_rows=torch.tensor([0, 1, 2]),
        gathered_rows=torch.tensor([0, 1, 2]),
    )

    out_TE = feed_forward_over(rows, KVP)(mlp, x_TE)

    assert [rows_RE.flatten().tolist() for rows_RE in seen] == [[1.0, 2.0, 30.0, 0.0]]
    assert out_TE.flatten().tolist() == [10.0, 20.0, 300.0, 0.0]
