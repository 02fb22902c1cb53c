"""Every backend gives windows, chunks and sinks on the same rows, decodes and prompts together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mnemosyne.attention import AttentionBackend, NativeBackend, ReferenceBackend, choose_backend
from mnemosyne.attention.chunked import Chunked, Reach
from mnemosyne.attention.lse import with_sink
from mnemosyne.cache.page_ids import id_dtype
from tests.attention.cases import (
    Case,
    Rows,
    assert_exact,
    assert_no_worse_than_eager,
    listed_in,
    make_case,
)
from tests.kernels import sets
from tests.kernels.sets import Kernels

REACHES: tuple[Reach, ...] = (None, 20, Chunked(32), Chunked(16))
# Rows of one and of many, on both sides of a chunk's boundary, of sequences and of their shards.
ROWS = (
    *(Rows(1, 0), Rows(1, 31), Rows(1, 32), Rows(1, 99), Rows(30, 0), Rows(45, 70), Rows(2, 63)),
    Rows(20, 64, first_key=48),  # the last shard of a sequence
    Rows(1, 60, key_stop=32, first_key=16),  # a shard that ends before the row's own chunk
    Rows(40, 20, key_stop=48),  # one that ends within the rows
    Rows(1, 30, key_stop=0),
)


def case_of(heads: tuple[int, int, int], dtype: torch.dtype) -> tuple[Case, Tensor]:
    """The rows as a step has them, and a sink per head, of which one takes nearly all."""
    case = replace(make_case(ROWS, heads=heads), scale=0.3).to(dtype)
    page_ids = torch.zeros(300, dtype=id_dtype(case.q_THD.device))
    case = replace(case, batch=listed_in(case.batch, page_ids))
    sink_H = torch.linspace(-3.0, 8.0, heads[0] * heads[1], dtype=torch.float64)
    return case, sink_H.to(dtype)


def with_sinks(case: Case, backend: AttentionBackend, reach: Reach, sink_H: Tensor) -> Tensor:
    out_THD, lse_TH = case.attend(backend, reach, return_lse=True)
    assert lse_TH is not None
    return with_sink(out_THD, lse_TH, sink_H)


def by_definition(case: Case, reach: Reach, sink_H: Tensor) -> Tensor:
    """Eager torch, the sink one more key of the value 0."""
    out_THD, lse_TH = case.dense(reach)
    both_TH = torch.logaddexp(lse_TH, sink_H.double().expand_as(lse_TH))
    return (out_THD * (lse_TH - both_TH).exp()[..., None]).to(case.q_THD.dtype)


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("name", ["reference", "cpu", "flex", "triton"])
def test_reaches_and_sinks_are_exact(name: str, reach: Reach) -> None:
    case, sink_H = case_of((2, 2, 16), torch.float64)
    backend = choose_backend(name, device=torch.device("cpu"), dtype=torch.float64, head_dim=16)

    found = with_sinks(case, backend, reach, sink_H)

    assert_exact(found, by_definition(case, reach, sink_H))


@pytest.mark.parametrize("reach", REACHES, ids=str)
@pytest.mark.parametrize("kernels", sets.ALL, ids=str)
def test_reaches_and_sinks_of_the_kernels_are_no_worse_than_eager(
    kernels: Kernels, reach: Reach
) -> None:
    instructions, dtype = sets.runnable(kernels)
    case, sink_H = case_of((2, 2, 64), dtype)
    backend = NativeBackend(instructions, head_dim=64, dtype=dtype)

    found = with_sinks(case, backend, reach, sink_H)

    wide, sinks_H = case.to(torch.float64), sink_H.double()
    exact = with_sinks(wide, ReferenceBackend(), reach, sinks_H)
    assert_exact(exact, by_definition(wide, reach, sinks_H))
    assert_no_worse_than_eager(found, by_definition(case, reach, sink_H), exact)
