"""Decodes whose launch stays the same: the results are the backend's, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.attention import AttentionBatch, Segment
from mnemosyne.attention.fixed_decodes import FixedDecodes
from mnemosyne.attention.tiles import cut_rows, most_items, split_keys
from mnemosyne.attention.triton import TritonBackend
from mnemosyne.cache.page_ids import id_dtype
from tests.attention.cases import Case, Rows, listed_in, make_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One that is cut, short ones, shards without keys and with a row that sees none, padding between.
RAGGED = (
    Rows(1, 1200),
    Rows(1, 0),
    Rows(1, 30, key_stop=0),
    Rows(1, 90, first_key=64),
    Rows(1, 17),
)


def fixed_for(case: Case, page_ids: torch.Tensor) -> FixedDecodes:
    return FixedDecodes(
        TritonBackend(),
        case.k_KSD,
        num_rows=case.batch.num_rows,
        page_size=case.batch.page_size,
        page_ids=page_ids,
    )


def new_page_ids() -> torch.Tensor:
    return torch.zeros(1000, dtype=id_dtype(torch.device(DEVICE)), device=DEVICE)


def as_many_rows(case: Case, num_rows: int) -> Case:
    """The same step with more padding."""
    padding = num_rows - len(case.q_THD)
    q_THD = torch.cat((case.q_THD, case.q_THD[:1].expand(padding, -1, -1)))
    return replace(case, batch=replace(case.batch, num_rows=num_rows), q_THD=q_THD)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_one_launch_serves_steps_of_any_lengths(window: int | None, dtype: torch.dtype) -> None:
    steps = [
        as_many_rows(make_case(rows, heads=(2, 3, 16), seed=seed), 12).to(dtype, DEVICE)
        for seed, rows in enumerate((RAGGED, RAGGED[::-1], RAGGED[1:2], [Rows(1, 700)] * 5))
    ]
    page_ids = new_page_ids()
    fixed, tables = fixed_for(steps[0], page_ids), set()

    for step in steps:
        step = replace(step, batch=listed_in(step.batch, page_ids))
        out, lse = step.attend(fixed, window, return_lse=True)
        expected_out, expected_lse = step.attend(TritonBackend(), window, return_lse=True)

        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)
        prepared = fixed.prepare(step.batch, window, step.q_THD.device)
        launch = prepared.items, prepared.merges, prepared.pages
        tables.add(tuple((table.data_ptr(), table.shape) for table in launch))
    assert expected_out.abs().sum() > 0
    assert len(tables) == 1


def test_an_empty_step_sees_nothing() -> None:
    case = make_case([Rows(1, 99)]).to(torch.float64, DEVICE)
    empty = replace(case, batch=AttentionBatch((), case.batch.num_rows, case.batch.page_size))

    out, lse = empty.attend(fixed_for(case, new_page_ids()), return_lse=True)

    assert not out.any()
    assert lse.isneginf().all()


@given(
    lengths=st.lists(st.integers(0, 10**7), max_size=20),
    num_shares=st.integers(0, 70),
    window=st.none() | st.integers(1, 5000),
)
def test_no_lengths_ask_for_more_items_than_the_most(
    lengths: list[int], num_shares: int, window: int | None
) -> None:
    pages = np.zeros(1, dtype=np.int64)
    segments = [Segment(row, 1, max(0, n - 1), n, pages) for row, n in enumerate(lengths)]
    tiles = cut_rows(segments, 1, window)

    items, merges, num_partials = split_keys(
        tiles, num_shares=num_shares, min_keys=256, block=64, merge_all=True
    )

    assert num_partials == len(items) <= most_items(len(tiles), num_shares)
    assert len(merges) == len(tiles)
