"""Attention of a step: shared rows leave first, the others are computed meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.attention.kvp import Pending, start_exchange
from mnemosyne.attention.reference import ReferenceBackend
from mnemosyne.attention.segments import AttentionBatch, Segment
from mnemosyne.attention.shared_rows import SharedRows
from mnemosyne.cache.pages import PagePool
from mnemosyne.operators import TORCH
from mnemosyne.parallel.mesh import Axis
from mnemosyne.runtime.inputs import StepInputs
from mnemosyne.runtime.step import LayerShape, PagedAttention

PAGE_SIZE = 4
LONG = Segment(first_row=0, num_rows=2, first_position=6, num_keys=8, pages=np.array([2, 0]))
SHORT = Segment(first_row=2, num_rows=1, first_position=1, num_keys=2, pages=np.array([1]))


class Recording(ReferenceBackend):
    """Says which rows it is asked for."""

    def __init__(self, events: list[str]) -> None:
        self._events = events

    def attend(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        rows = [segment.first_row for segment in arguments[3]]
        self._events.append(f"attend to rows from {rows}")
        return super().attend(*arguments, **keywords)


class WithoutLse(ReferenceBackend):
    """Keeps to itself what a sink needs."""

    def attend(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
        return super().attend(*arguments, **keywords)[0], None


def inputs_of(own: list[Segment], shared: list[Segment]) -> StepInputs:
    rows = [row for s in shared for row in range(s.first_row, s.first_row + s.num_rows)]
    local_rows = torch.tensor(rows, dtype=torch.int64)
    exchange_rows = torch.arange(len(rows))
    batch = AttentionBatch(tuple(shared), 4, PAGE_SIZE)
    return StepInputs(
        token_ids_T=torch.zeros(4, dtype=torch.int64),
        positions_T=torch.tensor([6, 7, 1, 0]),
        slots_T=torch.tensor([2, 3, 5, 12]),
        batch=AttentionBatch(tuple(own), 4, PAGE_SIZE),
        chunks=(),
        shared=SharedRows(len(rows), local_rows, exchange_rows, batch) if shared else None,
    )


@dataclass(frozen=True, slots=True)
class RecordedExchange:
    """Says when it starts and ends."""

    events: list[str]
    inner: Pending

    def finish(self, out_THD: Tensor, sink_H: Tensor | None = None) -> None:
        self.events.append("finish")
        self.inner.finish(out_THD, sink_H)


def attention_of(
    inputs: StepInputs,
    events: list[str],
    backend: ReferenceBackend | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    def exchange(*arguments: Any) -> Pending:
        events.append("start")
        return RecordedExchange(events, start_exchange(*arguments))

    torch.manual_seed(0)
    pool = PagePool(
        num_pages=3,
        page_size=PAGE_SIZE,
        num_layers=1,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    for tensor in (*pool.k, *pool.v):
        tensor.normal_()
    layers = LayerShape(windows=[None], scale=0.3)
    # One group alone: what is exchanged comes back merged with nothing else.
    settings = {"layers": layers, "kvp": Axis("kvp"), "exchange": exchange}
    attend = PagedAttention(pool, backend or Recording(events), TORCH, inputs, **settings)
    q_THD, k_TKD, v_TKD = (torch.randn(4, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    return attend(0, q_THD, k_TKD, v_TKD, sink_H=sink_H)


def test_partials_are_on_their_way_while_other_rows_are_computed() -> None:
    events: list[str] = []
    together = attention_of(inputs_of([LONG, SHORT], []), events)
    assert events == ["attend to rows from [0, 2]"]
    events.clear()

    apart = attention_of(inputs_of([SHORT], [LONG]), events)

    assert events == ["attend to rows from [0]", "start", "attend to rows from [2]", "finish"]
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-15)
    assert together[:3].abs().sum(-1).all()


def test_a_group_without_rows_of_its_own_attends_once() -> None:
    events: list[str] = []

    apart = attention_of(inputs_of([], [LONG]), events)

    assert events == ["attend to rows from [0]", "start", "finish"]
    assert apart[:2].abs().sum(-1).all()
    assert not apart[2:].any()


def test_a_sink_takes_its_share_whoever_computes_the_row() -> None:
    sink_H = torch.tensor([0.0, 2.0, -1.0, 4.0], dtype=torch.float64)

    together = attention_of(inputs_of([LONG, SHORT], []), [], sink_H=sink_H)
    apart = attention_of(inputs_of([SHORT], [LONG]), [], sink_H=sink_H)

    torch.testing.assert_close(apart, together, rtol=0, atol=1e-15)
    without = attention_of(inputs_of([LONG, SHORT], []), [])
    assert (together[:3].abs() < without[:3].abs()).all()


def test_no_backend_leaves_a_sink_out() -> None:
    inputs, sink_H = inputs_of([LONG, SHORT], []), torch.zeros(4, dtype=torch.float64)

    with pytest.raises(AssertionError, match="a sink takes its share by the LSE"):
        attention_of(inputs, [], WithoutLse(), sink_H)
