"""Keys and values between the pages of a rank and the files of leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemosyne.cache.layout import slots_of
from mnemosyne.cache.leaf_file import Part, Piece, Span
from mnemosyne.cache.pages import PagePool


@dataclass(frozen=True, slots=True)
class LeafCopies:
    """The layers and heads of a rank, out of its pages and into them.

    Args:
        pool: the pages.
        layers: of the model that the pool holds.
        heads: of each layer that it holds.
    """

    pool: PagePool
    layers: Span
    heads: Span

    def copy_out(
        self, pages: np.ndarray, first: int, tokens: Span
    ) -> tuple[Part, list[memoryview]]:
        """Keys and values of neighbouring tokens, as files hold them.

        Args:
            pages: int64, in key order.
            first: slot of the first token, counted from the first of these pages.
            tokens: of the leaf that they are.
        """
        slots = slots_of(pages, first, tokens.size, self.pool.page_size)
        kv = [pool for pair in zip(self.pool.k, self.pool.v, strict=True) for pool in pair]
        num_heads, _, head_dim = kv[0].shape
        shape = (len(kv), num_heads, tokens.size, head_dim)
        copied = torch.empty(shape, dtype=kv[0].dtype, device=kv[0].device)
        rows = _quick(copied)
        for first_row, first_slot, count in _runs(slots):
            for index, pool in enumerate(kv):
                found = _quick(pool)[:, first_slot : first_slot + count]
                rows[index, :, first_row : first_row + count] = found
        bytes_LB = copied.cpu().view(torch.uint8).reshape(len(kv), -1).numpy()
        return Part(self.layers, self.heads, tokens), [piece.data for piece in bytes_LB]

    def copy_in(self, pieces: Sequence[Piece], pages: np.ndarray, first: int, tokens: Span) -> None:
        """Write the keys and values of neighbouring tokens of a leaf to their pages.

        Args:
            pieces: of a leaf.
            pages: int64, in key order.
            first: slot of the first of the tokens, counted from the first of these pages.
            tokens: of the leaf; those of the pieces that are not among them are left out.
        """
        slots = slots_of(pages, first, tokens.size, self.pool.page_size)
        runs = list(_runs(slots))
        for piece in pieces:
            pool = (self.pool.v if piece.is_value else self.pool.k)[piece.layer - self.layers.first]
            heads = slice(piece.heads.first - self.heads.first, piece.heads.stop - self.heads.first)
            pool, rows_KND = _quick(pool), _quick(self._tensor(piece).to(pool.device))
            for first_row, first_slot, count in runs:
                run = Span(tokens.first + first_row, tokens.first + first_row + count)
                both = run.common(piece.tokens)
                if both.size:
                    slot = first_slot + both.first - run.first
                    row = both.first - piece.tokens.first
                    pool[heads, slot : slot + both.size] = rows_KND[:, row : row + both.size]

    def _tensor(self, piece: Piece) -> Tensor:
        pool = self.pool.k[0]
        rows = torch.frombuffer(piece.data, dtype=pool.dtype)
        return rows.view(piece.heads.size, piece.tokens.size, pool.shape[-1])


def _quick(rows: Tensor) -> Any:
    """The same memory for copies of a few hundred rows.

    On the CPU it is numpy's, which copies in this thread: torch would share the work with threads
    that may be kept busy by others.
    """
    return rows.view(torch.uint8).numpy() if rows.is_cpu else rows


def _runs(slots: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Neighbouring slots: the index of the first, the slot, and how many follow."""
    firsts = np.flatnonzero(np.diff(slots, prepend=slots[:1] - 2) != 1)
    for first, stop in zip(firsts.tolist(), [*firsts.tolist()[1:], len(slots)], strict=True):
        yield first, int(slots[first]), stop - first
