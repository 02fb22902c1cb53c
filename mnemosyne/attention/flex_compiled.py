"""FlexAttention compiled over the pool in place: a page is a key block, nothing is gathered."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from mnemosyne.attention.masks import (
    QUERY_BLOCK,
    PageBlocks,
    chunk_blocks,
    decode_blocks,
    decode_groups,
    page_positions,
)
from mnemosyne.attention.segments import Segment

MIN_PAGE = 16  # slots; the smallest tile of a GPU's matrix units

PagedKernel = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """Decodes along the batch, or one chunk along the query blocks."""

    rows: Tensor  # int64, of the packed rows
    blocks: PageBlocks
    is_chunk: bool


class PagedTables:
    """Block tables of a step and window, built for a number of heads when first asked for.

    Args:
        segments: those with keys.
        window: sliding window, or None.
        page_size: tokens per page.
        device: where the tables go.
    """

    def __init__(
        self, segments: Sequence[Segment], window: int | None, page_size: int, device: torch.device
    ) -> None:
        self.page_size = page_size
        self._segments = segments
        self._window = window
        self._device = device
        self._positions: Tensor | None = None
        self._calls: dict[int, list[_Call]] = {}

    def calls(self, group: int) -> list[_Call]:
        """The calls for ``group`` query heads per KV head."""
        if group not in self._calls:
            self._calls[group] = [*self._decodes(), *self._chunks(group)]
        return self._calls[group]

    def positions(self, num_pages: int) -> Tensor:
        """Position of the first key of each page, by page id."""
        if self._positions is None:
            self._positions = page_positions(
                self._segments, page_size=self.page_size, num_pages=num_pages, device=self._device
            )
        return self._positions

    def _decodes(self) -> Iterator[_Call]:
        decodes = [segment for segment in self._segments if segment.num_rows == 1]
        for segments in decode_groups(decodes):
            blocks = decode_blocks(
                segments,
                self._window,
                page_size=self.page_size,
                num_entries=_num_entries(len(segments), self._device),
                device=self._device,
            )
            rows = [segment.first_row for segment in segments]
            yield _Call(torch.tensor(rows, device=self._device), blocks, is_chunk=False)

    def _chunks(self, group: int) -> Iterator[_Call]:
        for chunk in self._segments:
            if chunk.num_rows > 1:
                blocks = chunk_blocks(
                    chunk, self._window, page_size=self.page_size, group=group, device=self._device
                )
                rows = torch.arange(chunk.num_rows, device=self._device) + chunk.first_row
                yield _Call(rows, blocks, is_chunk=True)


class CompiledFlex:
    """Owns the compiled kernels, by page size, heads, dtype, device, kind of call and result."""

    def __init__(self) -> None:
        self._kernels: dict[tuple[object, ...], PagedKernel] = {}

    def partials(
        self,
        q_TKGD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        tables: PagedTables,
        *,
        scale: float,
        return_lse: bool,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Rows, ``out_TKGD`` and ``lse_TKG`` of each call of the step.

        Raises:
            ValueError: if the page size is no power of two or below 16, or a KV head of the pool
                is too large for the 32-bit offsets of torch's GPU kernel.
        """
        _check_pool(k_KSD, tables.page_size)
        k, v = k_KSD.unsqueeze(0), v_KSD.unsqueeze(0)
        mark_dynamic((k, 2), (v, 2))
        num_pages = k.shape[2] // tables.page_size
        for call in tables.calls(group := q_TKGD.shape[2]):
            q_BKMD = _fold(q_TKGD[call.rows], call)
            kernel = self._kernel(tables.page_size, group, q_BKMD, call.is_chunk, return_lse)
            blocks = _kernel_tables(call, num_pages)
            out, lse = kernel(q_BKMD, k, v, *blocks, tables.positions(num_pages), scale)
            lse_TKG = None if lse is None else _unfold(lse.unsqueeze(-1), call, group).squeeze(-1)
            yield call.rows, _unfold(out, call, group), lse_TKG

    def _kernel(
        self, page_size: int, group: int, q: Tensor, is_chunk: bool, return_lse: bool
    ) -> PagedKernel:
        key = (page_size, group, q.dtype, q.device, is_chunk, return_lse)
        if key not in self._kernels:
            tiles = _tiles(page_size, q) if is_chunk and q.is_cuda else {}
            kernel = paged_kernel(page_size, group, return_lse, tiles)
            self._kernels[key] = torch.compile(own_code(kernel), fullgraph=True, dynamic=False)
        return self._kernels[key]


def paged_kernel(
    page_size: int, group: int, return_lse: bool, tiles: dict[str, int]
) -> PagedKernel:
    """Attention over pages as a function of tensors only, ready to compile.

    Args:
        page_size: tokens per page, the size of a key block.
        group: queries per row: the heads that share a KV head.
        return_lse: whether the kernel writes the LSE.
        tiles: FlexAttention's kernel options.
    """

    def paged(
        q_BKMD: Tensor,
        k_1KSD: Tensor,
        v_1KSD: Tensor,
        num_partial: Tensor,
        partial: Tensor,
        num_full: Tensor,
        full: Tensor,
        bounds_B3: Tensor,
        positions: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        def is_visible(b: Tensor, h: Tensor, m: Tensor, s: Tensor) -> Tensor:
            row = bounds_B3[b, 0] + m // group
            key = positions[s // page_size] + s % page_size
            return (key <= row) & (key < bounds_B3[b, 1]) & (key > row - bounds_B3[b, 2])

        block_mask = BlockMask.from_kv_blocks(
            num_partial,
            partial,
            num_full,
            full,
            BLOCK_SIZE=(QUERY_BLOCK, page_size),
            mask_mod=is_visible,
            seq_lengths=(q_BKMD.shape[2], k_1KSD.shape[2]),
            compute_q_blocks=False,
        )
        attention: Callable[..., Any] = flex_attention  # its overloads know no optional LSE
        result = attention(
            q_BKMD,
            k_1KSD,
            v_1KSD,
            block_mask=block_mask,
            scale=scale,
            kernel_options=tiles,
            return_aux=AuxRequest(lse=True) if return_lse else None,
        )
        return (result[0], result[1].lse) if return_lse else (result, None)

    return paged


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own.

    torch.compile keeps and counts its graphs per code object; so they live and die with the
    backend that compiles them, and several backends do not use up one another's share.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, code.co_name, None, function.__closure__)


def _check_pool(k_KSD: Tensor, page_size: int) -> None:
    if page_size < MIN_PAGE or page_size & (page_size - 1):
        raise ValueError(
            f"page_size must be a power of two >= {MIN_PAGE} for compiled FlexAttention, "
            f"got {page_size}; change cache.page_size or choose another attention backend"
        )
    head_elements = k_KSD.shape[1] * k_KSD.shape[2]
    if k_KSD.is_cuda and head_elements >= 2**31:
        raise ValueError(
            f"the pool must hold fewer than 2**31 elements per KV head for FlexAttention, "
            f"got {head_elements}; use fewer pages per rank"
        )


def _num_entries(num_decodes: int, device: torch.device) -> int:
    """Batch size of a call: on a GPU one of few, since there it decides how keys are split."""
    if device.type != "cuda":
        return max(2, num_decodes)  # torch.compile makes a batch of one a case of its own
    return next(size for size in (4, 16, 64, 256) if size >= num_decodes)


def _tiles(page_size: int, q: Tensor) -> dict[str, int]:
    """Kernel options of a chunk on a GPU: tiles that divide a block, small enough up to D = 256."""
    longest = 64 if q.element_size() == 2 else 32
    return {"BLOCK_M": longest, "BLOCK_N": min(page_size, longest), "num_stages": 2}


def _fold(q_TKGD: Tensor, call: _Call) -> Tensor:
    """Queries as ``[B, K, M, D]``, padded to the batch or to the blocks of the call."""
    batch, _, num_blocks = call.blocks.num_full.shape
    if not call.is_chunk:
        q_BKMD = pad(q_TKGD, (0, 0, 0, 0, 0, 0, 0, batch - q_TKGD.shape[0]))
        if not q_BKMD.is_cuda:
            mark_dynamic((q_BKMD, 0))
        return q_BKMD
    q_KMD = q_TKGD.transpose(0, 1).flatten(1, 2)
    q_BKMD = pad(q_KMD, (0, 0, 0, num_blocks * QUERY_BLOCK - q_KMD.shape[1])).unsqueeze(0)
    mark_dynamic((q_BKMD, 2))
    return q_BKMD


def _unfold(out_BKMD: Tensor, call: _Call, group: int) -> Tensor:
    """The inverse of ``_fold``, without the padding."""
    num_rows = call.rows.shape[0]
    if not call.is_chunk:
        return out_BKMD[:num_rows]
    out_KMD = out_BKMD[0, :, : num_rows * group]
    return out_KMD.unflatten(1, (num_rows, group)).transpose(0, 1)


def _kernel_tables(call: _Call, num_pages: int) -> tuple[Tensor, ...]:
    """Tables of a call as the kernel takes them, the dims that vary from step to step marked."""
    blocks = call.blocks
    partial = blocks.partial
    if partial.device.type == "cpu":
        # The CPU kernel wants the table as wide as the pool, but reads only the first few of each
        # row: rows may overlap, and the memory behind the last one may hold anything.
        flat = partial.new_empty(partial.numel() + num_pages)
        flat[: partial.numel()] = partial.flatten()
        partial = flat.as_strided((*partial.shape[:3], num_pages), partial.stride())
        mark_dynamic((partial, 3))
        full = blocks.full
    else:
        partial, full = alike(partial, blocks.full)
        mark_dynamic((partial, 3))
    tables = (blocks.num_partial, partial, blocks.num_full, full)
    if call.is_chunk or partial.device.type == "cpu":
        mark_dynamic(*((table, 2 if call.is_chunk else 0) for table in tables))
    mark_dynamic((full, 3))
    return *tables, blocks.bounds_B3


def alike(partial: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
    """Both tables as wide as the wider one, contiguous.

    The GPU kernel steps through the full pages with the strides of the partial ones (Inductor's
    templates ``flex_attention`` and ``flex_decode``, torch 2.11 to 2.13).
    """
    width = max(partial.shape[3], full.shape[3])
    partial, full = (pad(x, (0, width - x.shape[3])).contiguous() for x in (partial, full))
    return partial, full


def mark_dynamic(*dims: tuple[Tensor, int]) -> None:
    """Let torch.compile treat these dims as any size from 2 up; it refuses to specialise them."""
    for tensor, dim in dims:
        torch._dynamo.mark_dynamic(tensor, dim)
