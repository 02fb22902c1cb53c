"""Rows cut at chunks see what the definition says, on every group and at 10M positions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mnemosyne.attention.chunked import Chunked, cut, prepare
from mnemosyne.attention.lse import with_sink
from mnemosyne.attention.reference import ReferenceBackend
from mnemosyne.attention.segments import AttentionBatch, Segment

PAGE = 4


def batch_of(*segments: Segment, num_rows: int) -> AttentionBatch:
    return AttentionBatch(segments, num_rows, PAGE)


def seen(batch: AttentionBatch) -> dict[int, set[int]]:
    """Positions of the keys that each row sees, by row."""
    found: dict[int, set[int]] = {}
    for s in batch.segments:
        for row in range(s.num_rows):
            position = s.first_position + row
            keys = range(s.first_key, min(s.first_key + s.num_keys, position + 1))
            assert s.first_row + row not in found
            found[s.first_row + row] = set(keys)
    return found


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("first_key", [0, 12, 24])
@pytest.mark.parametrize(("first", "num_rows"), [(0, 1), (3, 1), (5, 30), (16, 16), (31, 2)])
def test_rows_see_the_keys_of_their_own_chunk(
    size: int, first_key: int, first: int, num_rows: int
) -> None:
    num_keys = max(0, first + num_rows - first_key)
    pages = np.arange(100, 100 + -(-num_keys // PAGE))
    segment = Segment(2, num_rows, first, num_keys, pages, first_key, first_page=7)

    pieces = cut(batch_of(segment, num_rows=num_rows + 3), size)

    found = seen(pieces)
    for row in range(num_rows):
        p = first + row
        expected = {j for j in range(first_key, p + 1) if j // size == p // size}
        assert found.get(2 + row, set()) == expected
    for piece in pieces.segments:
        assert piece.pages[0] == 100 + (piece.first_key - first_key) // PAGE
        assert piece.first_page == 7 + piece.pages[0] - 100
        assert len(piece.pages) >= -(-piece.num_keys // PAGE)


def test_far_rows_find_their_keys() -> None:
    size, boundary = 8192, 10_485_760 - 8192
    pages = np.arange((boundary + 32) // PAGE)
    segment = Segment(0, 64, boundary - 32, boundary + 32, pages)

    early, late = cut(batch_of(segment, num_rows=64), size).segments

    assert (early.first_key, early.num_keys, early.num_rows) == (boundary - size, size, 32)
    assert (late.first_key, late.num_keys, late.first_row) == (boundary, 32, 32)
    assert late.pages[0] == boundary // PAGE


def test_chunked_attention_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    q_THD = torch.randn(20, 2, 8, generator=generator, dtype=torch.float64)
    k_KSD, v_KSD = torch.randn(2, 1, 20, 8, generator=generator, dtype=torch.float64)
    batch = batch_of(Segment(0, 20, 0, 20, np.arange(5)), num_rows=20)
    backend = ReferenceBackend()

    prepared = prepare(backend, batch, Chunked(8), torch.device("cpu"))
    out_THD, _ = backend.attend(q_THD, k_KSD, v_KSD, prepared, scale=0.3)

    rows = torch.arange(20)[:, None]
    keys = torch.arange(20)
    hidden_TS = (keys > rows) | (keys // 8 != rows // 8)
    scores_HTS = 0.3 * torch.einsum("thd,sd->hts", q_THD, k_KSD[0])
    weights_HTS = scores_HTS.masked_fill(hidden_TS, float("-inf")).softmax(-1)
    expected = torch.einsum("hts,sd->thd", weights_HTS, v_KSD[0])
    torch.testing.assert_close(out_THD, expected, rtol=0, atol=1e-14)


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_HTS = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    v_SHD = torch.randn(7, 2, 4, generator=generator, dtype=torch.float64)
    sink_H = torch.tensor([0.5, -80.0], dtype=torch.float64)
    out_THD = torch.einsum("hts,shd->thd", scores_HTS.softmax(-1), v_SHD)

    found = with_sink(out_THD, scores_HTS.logsumexp(-1).t(), sink_H)

    sinks_HT1 = sink_H[:, None, None].expand(2, 3, 1)
    shares_HTS = torch.cat((scores_HTS, sinks_HT1), dim=-1).softmax(-1)[..., :7]
    expected = torch.einsum("hts,shd->thd", shares_HTS, v_SHD)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


def test_a_row_that_saw_no_key_gives_nothing_beside_a_sink() -> None:
    nothing = with_sink(torch.zeros(1, 1, 4), torch.full((1, 1), -torch.inf), torch.zeros(1))

    assert torch.equal(nothing, torch.zeros(1, 1, 4))
