"""Attention by the Triton kernels: one launch for all decodes of a step, one for all chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.attention.segments import AttentionBackend, AttentionBatch, Segment
from mnemosyne.attention.tiles import ROWS, cut_rows, of_whole_blocks, split_keys
from mnemosyne.kernels.configs import configs_for, is_interpreted, shape_key
from mnemosyne.kernels.paged_chunk import paged_chunk, tile_rows
from mnemosyne.kernels.paged_decode import paged_decode
from mnemosyne.kernels.tile import TileConfig, Tiles

TRITON_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTERPRETED_PROGRAMS = 8
MIN_SPLIT_KEYS = {"decode": 256, "chunk": 1024}  # below, a merge costs more than it spreads


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """Segments of a step; tables follow for a number of heads when a layer first asks."""

    decodes: list[Segment]
    chunks: list[Segment]
    page_ids: Tensor
    page_size: int
    window: int | None
    device: torch.device
    tiles: dict[tuple[str, int, int], Tiles]  # by kind, KV heads, rows of a tile


class TritonBackend:
    """Paged attention kernels of our own, for CUDA; on CPU in Triton's interpreter, for tests.

    Any page size, head ratio and head dim up to 256; float64, float32, bfloat16, float16, with
    LSE in float32 (float64 for float64 input). Slots that no row of a segment may see are never
    read. The keys of long sequences are split over the GPU and merged by log-sum-exp.

    Args:
        configs: how to build a kernel in half precision, by ``shape_key``; the first candidate
            is taken for others.
    """

    name = "triton"

    def __init__(self, configs: Mapping[str, TileConfig] | None = None) -> None:
        self.can_record = not is_interpreted()
        self._configs = configs or {}

    def prepare(self, batch: AttentionBatch, window: int | None, device: torch.device) -> _Prepared:
        """Sort the segments by kind (see ``AttentionBackend``)."""
        batch = batch.with_page_ids(device)
        assert batch.page_ids is not None
        decodes = [segment for segment in batch.segments if segment.num_rows == 1]
        chunks = [segment for segment in batch.segments if segment.num_rows > 1]
        return _Prepared(decodes, chunks, batch.page_ids, batch.page_size, window, device, {})

    def attend(
        self,
        q_THD: Tensor,
        k_KSD: Tensor,
        v_KSD: Tensor,
        prepared: _Prepared,
        *,
        scale: float,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the packed rows (see ``AttentionBackend``)."""
        if q_THD.dtype not in TRITON_DTYPES:
            raise ValueError(
                f"q_THD must have a dtype of {TRITON_DTYPES}, got {q_THD.dtype}; cast it"
            )
        num_kv_heads, _, head_dim = k_KSD.shape
        group = q_THD.shape[1] // num_kv_heads
        wide = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        q_THD = q_THD if q_THD.stride(-1) == 1 else q_THD.contiguous()
        size, window = prepared.page_size, prepared.window
        num_written = 0
        if prepared.decodes:
            decode = self.config("decode", q_THD, size)
            decodes = _tiles(prepared, "decode", num_kv_heads, 1, decode)
            num_written += decodes.num_rows
        if prepared.chunks:
            chunk = self.config("chunk", q_THD, size)
            rows = tile_rows(chunk, head_dim, group)
            chunks = _tiles(prepared, "chunk", num_kv_heads, rows, chunk)
            num_written += chunks.num_rows
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        lse_TH = torch.empty(q_THD.shape[:2], dtype=wide, device=q_THD.device)
        if num_written < len(q_THD):  # some rows see no key
            out_THD.zero_()
            lse_TH.fill_(-torch.inf)
        tensors = q_THD, k_KSD, v_KSD, out_THD, lse_TH
        if prepared.decodes:
            paged_decode(*tensors, decodes, page_size=size, scale=scale, config=decode)
        if prepared.chunks:
            paged_chunk(*tensors, chunks, page_size=size, window=window, scale=scale, config=chunk)
        return out_THD, lse_TH if return_lse else None

    def fixed(
        self, k_KSD: Tensor, *, num_rows: int, page_size: int, page_ids: Tensor
    ) -> AttentionBackend:
        """See ``RecordableBackend``."""
        from mnemosyne.attention.fixed_decodes import FixedDecodes  # it imports this file

        return FixedDecodes(self, k_KSD, num_rows=num_rows, page_size=page_size, page_ids=page_ids)

    def config(self, kind: str, like: Tensor, page_size: int) -> TileConfig:
        """The build of the kernel of ``decode`` or ``chunk`` for queries or keys as these."""
        head_dim, shape = like.shape[-1], shape_key(kind, like.shape[-1], page_size)
        if like.dtype.itemsize == 2 and shape in self._configs:
            return self._configs[shape]
        capability = torch.cuda.get_device_capability(like.device)[0] if like.is_cuda else None
        return configs_for(kind, like.dtype, head_dim, page_size, capability)[0]


def _tiles(
    prepared: _Prepared, kind: str, num_kv_heads: int, rows: int, config: TileConfig
) -> Tiles:
    key = kind, num_kv_heads, rows
    if key not in prepared.tiles:
        segments = prepared.decodes if kind == "decode" else prepared.chunks
        prepared.tiles[key] = make_tiles(
            segments,
            prepared.page_ids,
            prepared.window,
            tile_rows=rows,
            num_shares=num_programs(config, prepared.device) // num_kv_heads,
            min_keys=MIN_SPLIT_KEYS[kind],
            block=config.block_n,
            device=prepared.device,
            specialized=config.specialized and prepared.window is None,
        )
    return prepared.tiles[key]


def make_tiles(
    segments: list[Segment],
    page_ids: Tensor,
    window: int | None,
    *,
    tile_rows: int,
    num_shares: int,
    min_keys: int,
    block: int,
    device: torch.device,
    specialized: bool = False,
) -> Tiles:
    """The tables of one launch on the device; arguments as for ``cut_rows`` and ``split_keys``."""
    tiles = cut_rows(segments, tile_rows, window)
    items, merges, num_partials = split_keys(
        tiles,
        num_shares=num_shares,
        min_keys=min_keys,
        block=block,
        whole_blocks=specialized,
    )
    is_whole = of_whole_blocks(items, block) & specialized
    tables = items[~is_whole], items[is_whole], merges
    own, whole, merged = (torch.from_numpy(table).to(device) for table in tables)
    return Tiles(
        items=own,
        whole_items=whole,
        merges=merged,
        pages=page_ids,
        num_partials=num_partials,
        most_parts=int(merges[:, 2].max(initial=1)),
        num_rows=int(tiles[:, ROWS].sum()),
    )


def num_programs(config: TileConfig, device: torch.device) -> int:
    """Programs that a launch for one long sequence should have."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * config.programs
