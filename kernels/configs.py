"""How the attention kernels may be built, by GPU; the GPU suite finds out which is fastest."""

from __future__ import annotations

import torch
import triton

from mnemosyne.kernels.tile import DESCRIPTOR_HEAD_DIMS, SPECIALIZED_HEAD_DIMS, TileConfig

# Candidates by the major compute capability; the first that fits is used where none was measured.
# Those of 9 are ordered by what an H200 took; the others, never timed, by what does not spill.
DECODE_CONFIGS: dict[int, tuple[TileConfig, ...]] = {
    8: (TileConfig(16, 64, 4, 3), TileConfig(16, 64, 4, 4)),
    9: (
        TileConfig(16, 64, 4, 3),
        TileConfig(16, 64, 4, 3, descriptor=True),
        TileConfig(16, 64, 4, 5, programs=1),
        TileConfig(16, 128, 4, 3, descriptor=True, programs=1),
        TileConfig(16, 128, 8, 3, descriptor=True, programs=1),
    ),
    10: (TileConfig(16, 64, 4, 3), TileConfig(16, 64, 4, 4)),
}
CHUNK_CONFIGS: dict[int, tuple[TileConfig, ...]] = {
    8: (TileConfig(64, 64, 8, 3), TileConfig(64, 32, 4, 3)),
    9: (
        TileConfig(128, 128, 8, 3, descriptor=True, specialized=True),
        TileConfig(128, 128, 8, 3, descriptor=True),
        TileConfig(128, 64, 8, 3),
        TileConfig(64, 64, 4, 3),
    ),
    10: (
        TileConfig(128, 128, 8, 2, descriptor=True),
        TileConfig(128, 64, 8, 3, descriptor=True),
        TileConfig(128, 64, 8, 3),
        TileConfig(64, 64, 4, 3),
    ),
}
# Products of float32 and float64 keep their digits only outside TF32, which takes more registers.
WIDE_CONFIGS = {"decode": TileConfig(16, 32, 8, 2), "chunk": TileConfig(16, 16, 8, 2)}
LONG_HEAD_CONFIGS = {"decode": TileConfig(16, 32, 4, 2), "chunk": TileConfig(64, 32, 8, 2)}
INTERPRETED = TileConfig(16, 32, 4, 2)


def is_interpreted() -> bool:
    """Return whether this process runs kernels in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def shape_key(kind: str, head_dim: int, page_size: int) -> str:
    """The key under which the fastest candidate is noted: ``decode D128 N128``."""
    return f"{kind} D{head_dim} N{page_size}"


def configs_for(
    kind: str, dtype: torch.dtype, head_dim: int, page_size: int, capability: int | None
) -> tuple[TileConfig, ...]:
    """Candidates for a kernel, the one to take unmeasured first.

    Args:
        kind: ``decode`` or ``chunk``.
        dtype: of queries, keys and values.
        head_dim: D; above 128 tiles are smaller.
        page_size: tokens per page.
        capability: major compute capability; None for the interpreter.
    """
    if capability is None:
        return (INTERPRETED,)
    if dtype.itemsize > 2:
        return (WIDE_CONFIGS[kind],)
    if head_dim > 128:
        return (LONG_HEAD_CONFIGS[kind],)
    table = DECODE_CONFIGS if kind == "decode" else CHUNK_CONFIGS
    configs = table[max(key for key in table if key <= max(8, capability))]
    return tuple(config for config in configs if _fits(config, head_dim, page_size))


def _fits(config: TileConfig, head_dim: int, page_size: int) -> bool:
    """A descriptor reads neighbouring slots: blocks must lie in one page."""
    if not config.descriptor:
        return True
    head_dims = SPECIALIZED_HEAD_DIMS if config.specialized else DESCRIPTOR_HEAD_DIMS
    return head_dim in head_dims and page_size % config.block_n == 0
