"""Decodes by one backend and chunks by another: the results of one for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from mnemosyne.attention import ByKind, CpuBackend, ReferenceBackend
from tests.attention.cases import MIXED, Rows, assert_exact, make_case

CHUNKS = [rows for rows in MIXED if rows.num_rows > 1]
DECODES = [rows for rows in MIXED if rows.num_rows == 1]


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("rows", [MIXED, CHUNKS, DECODES, ()], ids=["both", "c", "d", "none"])
def test_each_kind_is_computed_once_and_all_rows_are_right(
    rows: Sequence[Rows], window: int | None, return_lse: bool
) -> None:
    case = make_case(rows or DECODES)
    if not rows:  # all of them are padding
        case = replace(case, batch=replace(case.batch, segments=()))

    out, lse = case.attend(ByKind(CpuBackend(), ReferenceBackend()), window, return_lse=return_lse)

    expected_out, expected_lse = case.attend(ReferenceBackend(), window, return_lse=return_lse)
    assert_exact(out, expected_out)
    assert (lse is None) is not return_lse
    if lse is not None:
        assert_exact(lse, expected_lse)
