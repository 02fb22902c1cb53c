"""Partials merge into the whole: any split of the keys, empty parts included."""

from __future__ import annotations

import doctest
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mnemosyne.attention import lse as lse_module
from mnemosyne.attention.lse import merge_into, merge_partials
from tests.attention.cases import assert_exact


def attend(q_THD: Tensor, k_SHD: Tensor, v_SHD: Tensor, mask_TS: Tensor) -> tuple[Tensor, Tensor]:
    score_THS = torch.einsum("thd,shd->ths", q_THD, k_SHD)
    score_THS = score_THS.masked_fill(~mask_TS.unsqueeze(1), -torch.inf)
    weight_THS = score_THS.softmax(-1).nan_to_num(0.0)
    return torch.einsum("ths,shd->thd", weight_THS, v_SHD), score_THS.logsumexp(-1)


def random_partials(seed: int, cuts: list[int]) -> tuple[list, tuple[Tensor, Tensor]]:
    """Partials over the keys between the cuts, and the whole; some rows see few keys or none."""
    torch.manual_seed(seed)
    bounds = [0, *sorted(cuts), 40]
    q, k, v = (torch.randn(n, 2, 8, dtype=torch.float64) for n in (5, 40, 40))
    mask = torch.rand(5, 40) < torch.tensor([1.0, 0.5, 0.1, 0.02, 0.0]).unsqueeze(1)
    parts = [attend(q, k[a:b], v[a:b], mask[:, a:b]) for a, b in pairwise(bounds)]
    return parts, attend(q, k, v, mask)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 40), max_size=6))
def test_merged_shards_equal_the_whole(seed: int, cuts: list[int]) -> None:
    parts, (out, lse) = random_partials(seed, cuts)

    merged_out, merged_lse = merge_partials(*(torch.stack(x) for x in zip(*parts, strict=True)))

    assert_exact(merged_out, out)
    assert_exact(merged_lse, lse)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 40), max_size=6), st.booleans())
def test_merging_one_by_one_equals_merging_at_once(
    seed: int, cuts: list[int], from_nothing: bool
) -> None:
    parts, (out, lse) = random_partials(seed, cuts)
    empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)

    running_out, running_lse = empty if from_nothing else parts.pop(0)
    for part in parts:
        merge_into(running_out, running_lse, *part)

    assert_exact(running_out, out)
    assert_exact(running_lse, lse)


def test_rows_that_no_shard_saw_stay_empty() -> None:
    out = torch.zeros(3, 4, 2, 8)
    lse = torch.full((3, 4, 2), -torch.inf)

    merged_out, merged_lse = merge_partials(out, lse)

    assert torch.equal(merged_out, torch.zeros(4, 2, 8))
    assert torch.equal(merged_lse, torch.full((4, 2), -torch.inf))


def test_weights_neither_overflow_nor_vanish() -> None:
    out = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)

    merged, lse = merge_partials(out, torch.tensor([1e4, 1e4]).view(2, 1, 1))
    far, _ = merge_partials(out, torch.tensor([-1e4, 1e4]).view(2, 1, 1))

    assert merged.item() == 2.0
    assert lse.item() == pytest.approx(1e4 + np.log(2))
    assert far.item() == 3.0


def test_statistics_stay_wide_when_outputs_are_narrow() -> None:
    out = torch.randn(3, 4, 2, 8).bfloat16()
    lse = torch.randn(3, 4, 2)

    merged_out, merged_lse = merge_partials(out, lse)
    exact_out, _ = merge_partials(out.double(), lse.double())

    assert merged_out.dtype == torch.bfloat16
    assert merged_lse.dtype == torch.float32
    # Only the result is rounded: within half a unit in the last place.
    assert ((merged_out - exact_out).abs() <= 2**-8 * exact_out.abs() + 1e-6).all()


def test_a_narrow_lse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be float32 or float64, got .*bfloat16"):
        merge_partials(torch.zeros(2, 3, 1, 4), torch.zeros(2, 3, 1).bfloat16())


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 1\), got \(2, 1, 3\)"):
        merge_partials(torch.zeros(2, 3, 1, 4), torch.zeros(2, 1, 3))


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(lse_module).attempted > 3
    assert doctest.testmod(lse_module).failed == 0
