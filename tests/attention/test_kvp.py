"""Partials of several groups, packed into messages and merged, as if nothing had lain between."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.attention.kvp import merge_packed, pack_partials
from mnemosyne.attention.lse import merge_partials
from mnemosyne.attention.segments import AttentionBatch
from mnemosyne.attention.shared_rows import SharedRows

NUM_GROUPS, NUM_ROWS, NUM_HEADS, HEAD_DIM = 3, 5, 2, 8


def _shared(local_rows: list[int], exchange_rows: list[int]) -> SharedRows:
    return SharedRows(
        NUM_ROWS,
        torch.tensor(local_rows),
        torch.tensor(exchange_rows),
        AttentionBatch((), NUM_ROWS, page_size=16),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_message_carries_the_lse_to_the_bit_in_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shared = _shared(list(range(NUM_ROWS)), list(range(NUM_ROWS)))
    out = torch.randn(NUM_GROUPS, NUM_ROWS, NUM_HEADS, HEAD_DIM).to(dtype)
    # neighbours that bfloat16 and float16 cannot tell apart, as large contexts have them
    lse = 20 + 0.01 * torch.rand(NUM_GROUPS, NUM_ROWS, NUM_HEADS, dtype=wide)

    packed = torch.stack([pack_partials(out[g], lse[g], shared) for g in range(NUM_GROUPS)])
    merged, _ = merge_packed(packed, shared, HEAD_DIM, wide)

    assert packed.dtype == merged.dtype == dtype
    assert merged.equal(merge_partials(out, lse)[0])
    assert not merged.equal(merge_partials(out, lse.to(torch.bfloat16).to(wide))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_group_without_a_row_leaves_it_to_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    whole = _shared(list(range(NUM_ROWS)), list(range(NUM_ROWS)))
    some = _shared([0, 1], [3, 1])
    out = torch.randn(2, NUM_ROWS, NUM_HEADS, HEAD_DIM).to(dtype)
    lse = torch.randn(2, NUM_ROWS, NUM_HEADS, dtype=wide)

    packed = torch.stack(
        [pack_partials(out[0], lse[0], whole), pack_partials(out[1], lse[1], some)]
    )
    merged, _ = merge_packed(packed, whole, HEAD_DIM, wide)

    for row in (0, 2, 4):
        assert merged[row].equal(out[0, row])
    for row, local in ((3, 0), (1, 1)):
        both = torch.stack([out[0, row], out[1, local]]), torch.stack([lse[0, row], lse[1, local]])
        torch.testing.assert_close(merged[row], merge_partials(*both)[0], atol=1e-14, rtol=0)
