"""Speed of attention by backend and keys, beside torch's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from mnemosyne.attention import AttentionBackend, AttentionBatch, FlexBackend, Segment
from mnemosyne.attention.triton import TritonBackend
from mnemosyne.kernels.configs import configs_for, shape_key
from mnemosyne.kernels.tile import TileConfig
from tools.gpu.setting import Entry, Setting

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # those of Llama-3-8B
PAGE_SIZES = (128, 16)  # the default, and one of which several make a block of keys
SCALE = HEAD_DIM**-0.5
KEYS = (2**13, 2**16, 2**17, 2**20, 2**22)


def decode(setting: Setting) -> Iterator[Entry]:
    """GB/s of K and V read by one row, in bfloat16; 8K keys may come from the L2 cache."""
    for keys in (128,) if setting.smoke else KEYS:
        yield from attention(setting, 1, keys)


def chunk(setting: Setting) -> Iterator[Entry]:
    """TFLOP/s of the last 2048 rows of a prompt, causal count, in bfloat16."""
    for keys in (128,) if setting.smoke else KEYS:
        yield from attention(setting, 4 if setting.smoke else 2048, keys)


def configs(setting: Setting) -> Iterator[Entry]:
    """Every candidate of kernels/configs.py on one decode and one chunk; the least seconds win."""
    keys = 128 if setting.smoke else 2**17
    for page_size in PAGE_SIZES:
        for kind, rows in (("decode", 1), ("chunk", 4 if setting.smoke else 2048)):
            q, k, v, batch = paged_case(setting.device, rows, keys, page_size)
            shape, done = shape_key(kind, HEAD_DIM, page_size), work_of(rows, keys)
            for config in configs_for(kind, q.dtype, HEAD_DIM, page_size, setting.capability):
                backend = TritonBackend({shape: config})
                prepared = backend.prepare(batch, None, setting.device)
                work = partial(backend.attend, q, k, v, prepared, scale=SCALE)
                about = {"shape": shape, "config": asdict(config)}
                yield f"{shape} {describe(config)}", about | setting.timed(work, *done)


def describe(config: TileConfig) -> str:
    """Tile, warps and stages in one word each."""
    word = f"{config.block_m}x{config.block_n} w{config.num_warps} s{config.num_stages}"
    word += f" p{config.programs}" + " descriptor" * config.descriptor
    return word + " specialized" * config.specialized


def paged_case(
    device: torch.device, rows: int, keys: int, page_size: int = PAGE_SIZES[0]
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """q, k and v of the last rows of one sequence, its pages shuffled."""
    pages = np.random.default_rng(0).permutation(keys // page_size).astype(np.int64)
    segment = Segment(0, rows, keys - rows, keys, pages)
    options = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(rows, HEADS, HEAD_DIM, **options)
    k, v = (torch.randn(KV_HEADS, keys, HEAD_DIM, **options) for _ in "kv")
    return q, k, v, AttentionBatch((segment,), rows, page_size)


def work_of(rows: int, keys: int) -> tuple[str, float]:
    """Count the work of the last rows of a sequence: GB of K and V for one, TFLOP for more."""
    if rows == 1:
        return "GB_s", 4 * keys * KV_HEADS * HEAD_DIM / 1e9
    return "TFLOP_s", 4 * HEADS * HEAD_DIM * rows * (keys - rows / 2) / 1e12


def attention(setting: Setting, rows: int, keys: int) -> Iterator[Entry]:
    """One sequence in shuffled pages by our backends; without pages by torch's kernels."""
    done = work_of(rows, keys)
    q, k, v, batch = paged_case(setting.device, rows, keys)
    backends: list[AttentionBackend] = [TritonBackend(setting.configs)]
    has_peers = rows == 1 or keys < KEYS[-1]  # where they would take most of the time
    if has_peers and not setting.smoke:
        backends.append(FlexBackend())
    for backend in backends:
        prepared = backend.prepare(batch, None, setting.device)
        work: Callable[[], Any] = partial(backend.attend, q, k, v, prepared, scale=SCALE)
        yield f"{backend.name} {keys}", setting.timed(work, *done)
    if not has_peers:
        return
    for name, kernel in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        work = partial(sdpa, q, k, v, kernel)
        yield f"sdpa {name} {keys}", setting.timed(work, *done)
    yield f"varlen {keys}", setting.timed(varlen(q, k, v), *done)


def sdpa(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor, kernel: SDPBackend) -> Tensor:
    """One of torch's kernels, over keys without pages."""
    mask = causal_lower_right(len(q_THD), k_KSD.shape[1]) if len(q_THD) > 1 else None
    q, k, v = q_THD.transpose(0, 1)[None], k_KSD[None], v_KSD[None]
    with sdpa_kernel(kernel):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE, enable_gqa=True)


def varlen(q_THD: Tensor, k_KSD: Tensor, v_KSD: Tensor) -> Callable[[], Any]:
    """``torch.nn.attention.varlen`` on one sequence, in the layout that it wants."""
    k_SKD, v_SKD = (x.transpose(0, 1).contiguous() for x in (k_KSD, v_KSD))
    ends = [
        torch.tensor([0, n], dtype=torch.int32, device=q_THD.device)
        for n in (len(q_THD), len(k_SKD))
    ]

    def work() -> Any:
        from torch.nn.attention.varlen import varlen_attn  # may be missing: an entry says so

        options: dict[str, Any] = {"scale": SCALE, "window_size": (-1, 0)}
        if "enable_gqa" in signature(varlen_attn).parameters:  # not in torch 2.11
            options["enable_gqa"] = True
        return varlen_attn(q_THD, k_SKD, v_SKD, *ends, len(q_THD), len(k_SKD), **options)

    return work
