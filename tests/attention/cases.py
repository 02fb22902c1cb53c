"""Ragged batches over paged pools, dense attention in plain torch, and the error budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mnemosyne.attention import AttentionBackend, AttentionBatch, Segment
from mnemosyne.attention.chunked import Chunked, Reach, prepare
from mnemosyne.cache.layout import slots_of

LAYOUTS = ("contiguous", "fragmented", "shuffled")


@dataclass(frozen=True)
class Rows:
    """One segment: so many rows from a position on, over the keys from one position to another."""

    num_rows: int
    first_position: int
    key_stop: int | None = None  # default: up to the last row
    first_key: int = 0


# Decodes, chunks from the start and from the middle, and every kind of shard.
MIXED = (
    Rows(1, 0),  # the first token of all
    Rows(1, 99),
    Rows(30, 0),  # a prompt's first chunk
    Rows(45, 70),  # a later one; its own keys straddle pages
    Rows(1, 60, key_stop=32, first_key=7),  # a shard that ends before the row
    Rows(20, 100, key_stop=90),  # the same for a chunk
    Rows(20, 64, first_key=48),  # the last shard of a chunk
    Rows(9, 50, first_key=54),  # a shard that begins within the rows
    Rows(9, 50, key_stop=54),  # one that ends within them
    Rows(2, 10, key_stop=21, first_key=20),  # one token, after the rows
    Rows(3, 20, key_stop=21, first_key=20),  # one token, the first row's own
    Rows(4, 30, key_stop=200, first_key=100),  # starts after the rows
    Rows(1, 30, key_stop=200, first_key=100),
    Rows(4, 30, key_stop=12, first_key=12),  # empty
    Rows(1, 30, key_stop=0),
)
WINDOWS = (None, 1, 5, 40, 10_000)  # none, own key, within a page, across pages, above the context


def listed_in(batch: AttentionBatch, page_ids: Tensor) -> AttentionBatch:
    """The batch with its page ids in a tensor that outlives it, from a place in it on."""
    laid_out = batch.with_page_ids(page_ids.device)
    assert laid_out.page_ids is not None
    page_ids[17 : 17 + len(laid_out.page_ids)] = laid_out.page_ids
    segments = [s._replace(first_page=17 + s.first_page) for s in laid_out.segments]
    return replace(laid_out, segments=tuple(segments), page_ids=page_ids)


@dataclass(frozen=True)
class Case:
    """A step and its pool."""

    batch: AttentionBatch
    q_THD: Tensor
    k_KSD: Tensor
    v_KSD: Tensor
    scale: float

    def attend(
        self, backend: AttentionBackend, reach: Reach = None, *, return_lse: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        prepared = prepare(backend, self.batch, reach, self.q_THD.device)
        return backend.attend(
            self.q_THD, self.k_KSD, self.v_KSD, prepared, scale=self.scale, return_lse=return_lse
        )

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        q, k, v = (x.to(device, dtype) for x in (self.q_THD, self.k_KSD, self.v_KSD))
        return Case(self.batch, q, k, v, self.scale)

    def dense(self, reach: Reach = None) -> tuple[Tensor, Tensor]:
        """Eager torch in the dtype of the case; the LSE is that of its scores, in float64."""
        out_THD = torch.zeros_like(self.q_THD)
        lse_TH = torch.full_like(self.q_THD[..., 0], -torch.inf, dtype=torch.float64)
        group = self.q_THD.shape[1] // self.k_KSD.shape[0]
        for segment in self.batch.segments:
            slots = slots_of(segment.pages, 0, segment.num_keys, self.batch.page_size)
            k_HSD = self.k_KSD[:, slots].repeat_interleave(group, dim=0)
            v_HSD = self.v_KSD[:, slots].repeat_interleave(group, dim=0)
            rows = slice(segment.first_row, segment.first_row + segment.num_rows)
            row = segment.first_position + torch.arange(segment.num_rows).unsqueeze(1)
            key = segment.first_key + torch.arange(segment.num_keys)
            visible = key <= row
            if isinstance(reach, Chunked):
                visible &= key // reach.size == row // reach.size
            elif reach is not None:
                visible &= key > row - reach
            score_HTS = (self.q_THD[rows].transpose(0, 1) @ k_HSD.mT) * self.scale
            score_HTS = score_HTS.masked_fill(~visible.to(score_HTS.device), -torch.inf)
            weight_HTS = score_HTS.softmax(-1).nan_to_num(0.0)  # rows that see no key
            out_THD[rows] = (weight_HTS @ v_HSD).transpose(0, 1)
            lse_TH[rows] = score_HTS.double().logsumexp(-1).T
        return out_THD, lse_TH


def make_case(
    rows: Sequence[Rows] = MIXED,
    *,
    heads: tuple[int, int, int] = (2, 2, 16),
    layout: str = "shuffled",
    page_size: int = 16,
    unused: float = 0.0,
    num_pages: int = 256,
    seed: int = 0,
) -> Case:
    """A float64 case of K KV heads, K * G query heads and head dim D.

    Two padding rows stand between segments now and then. Slots that no segment holds are
    ``unused``.
    """
    num_kv_heads, group, head_dim = heads
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    free = _page_order(layout, num_pages, rng)
    k_KSD, v_KSD = torch.full((2, num_kv_heads, num_pages * page_size, head_dim), unused).double()
    segments, first_row, first_page = [], 0, 0
    for index, part in enumerate(rows):
        stop = part.first_position + part.num_rows if part.key_stop is None else part.key_stop
        num_keys = stop - part.first_key
        used = -(-num_keys // page_size)
        pages = free[first_page : first_page + used + index % 2]  # some hold a page for later
        first_page += used + 1
        segments.append(
            Segment(first_row, part.num_rows, part.first_position, num_keys, pages, part.first_key)
        )
        slots = slots_of(pages, 0, num_keys, page_size)
        for pool in (k_KSD, v_KSD):
            pool[:, slots] = torch.randn(num_kv_heads, num_keys, head_dim, dtype=torch.float64)
        first_row += part.num_rows + 2 * (index % 3 == 0)
    q_THD = torch.randn(first_row, num_kv_heads * group, head_dim, dtype=torch.float64)
    batch = AttentionBatch(tuple(segments), first_row, page_size)
    return Case(batch, q_THD, k_KSD, v_KSD, head_dim**-0.5)


def _page_order(layout: str, num_pages: int, rng: np.random.Generator) -> np.ndarray:
    pages = np.arange(num_pages, dtype=np.int64)
    if layout == "contiguous":
        return pages
    if layout == "fragmented":  # runs of one to three pages, in order
        return pages[rng.random(num_pages) < 0.7]
    assert layout == "shuffled"
    return rng.permutation(pages)


def assert_exact(actual: Tensor | None, expected: Tensor | None) -> None:
    """Equal up to the order of float64 additions; -inf in the same places."""
    assert actual is not None
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def assert_no_worse_than_eager(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error of ``actual`` is at most twice that of eager torch in the same dtype."""
    budget = 2 * (eager.double() - exact).abs().max()
    budget += torch.finfo(actual.dtype).eps * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"max error {error:.3e} exceeds the budget {budget:.3e}"
