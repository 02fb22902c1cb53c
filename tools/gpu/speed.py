"""Speed of attention by backend and keys, beside torch's own kernels; and of the fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from mnemosyne.attention import AttentionBatch, Segment, choose_backend
from mnemosyne.attention.triton import TritonBackend
from mnemosyne.kernels.add_rms_norm import add_rms_norm
from mnemosyne.kernels.configs import configs_for
from mnemosyne.kernels.rotate_and_write import rotate_and_write
from mnemosyne.model_zoo.rope import RopeSpec, rotary_cos_sin, rotate
from tools.gpu.timing import Entry, device_of, timed

HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, WIDTH = 32, 8, 128, 128, 4096  # those of Llama-3-8B
SCALE = HEAD_DIM**-0.5
KEYS = (2**13, 2**16, 2**17, 2**20, 2**22)


def decode(smoke: bool) -> Iterator[Entry]:
    """GB/s of K and V read by one row, in bfloat16."""
    for keys in (256,) if smoke else KEYS:
        yield from attention(smoke, 1, keys, "GB_s", 4 * keys * KV_HEADS * HEAD_DIM / 1e9)


def chunk(smoke: bool) -> Iterator[Entry]:
    """TFLOP/s of the last 2048 rows of a prompt, causal count, in bfloat16."""
    rows = 16 if smoke else 2048
    for keys in (256,) if smoke else KEYS:
        flop = 4 * HEADS * HEAD_DIM * rows * (keys - rows / 2)
        yield from attention(smoke, rows, keys, "TFLOP_s", flop / 1e12)


def configs(smoke: bool) -> Iterator[Entry]:
    """Every candidate of kernels/configs.py on one decode and one chunk; the least seconds win."""
    device, keys = device_of(smoke), 256 if smoke else 2**17
    capability = None if smoke else torch.cuda.get_device_capability()[0]
    for kind, rows in (("decode", 1), ("chunk", 16 if smoke else 2048)):
        q, k, v, batch = paged_case(device, rows, keys)
        for config in configs_for(kind, q.dtype, HEAD_DIM, PAGE_SIZE, capability):
            backend = TritonBackend({kind: config})
            prepared = backend.prepare(batch, None, device)
            work = partial(backend.attend, q, k, v, prepared, scale=SCALE)
            yield f"{kind} {keys} {config}", timed(work, smoke, "calls_s", 1)


def paged_case(
    device: torch.device, rows: int, keys: int
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """q, k and v of the last rows of one sequence, its pages shuffled."""
    pages = np.random.default_rng(0).permutation(keys // PAGE_SIZE).astype(np.int64)
    segment = Segment(0, rows, keys - rows, keys, pages)
    options = {"dtype": torch.bfloat16, "device": device}
    q = torch.randn(rows, HEADS, HEAD_DIM, **options)
    k, v = (torch.randn(KV_HEADS, keys, HEAD_DIM, **options) for _ in "kv")
    return q, k, v, AttentionBatch((segment,), rows, PAGE_SIZE)


def attention(smoke: bool, rows: int, keys: int, unit: str, amount: float) -> Iterator[Entry]:
    """One sequence in shuffled pages by our backends; without pages by torch's kernels."""
    device = device_of(smoke)
    q, k, v, batch = paged_case(device, rows, keys)
    for name in ("triton",) if smoke else ("triton", "flex"):
        backend = choose_backend(name, device=device, dtype=q.dtype, head_dim=HEAD_DIM)
        prepared = backend.prepare(batch, None, device)
        work: Callable[[], Any] = partial(backend.attend, q, k, v, prepared, scale=SCALE)
        yield f"{name} {keys}", timed(work, smoke, unit, amount)
    for name, kernel in (
        ("flash", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        work = partial(sdpa, q, k, v, kernel)
        yield f"sdpa {name} {keys}", timed(work, smoke, unit, amount)
    yield f"varlen {keys}", timed(varlen(q, k, v), smoke, unit, amount)


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

        sizes = len(q_THD), len(k_SKD)
        return varlen_attn(
            q_THD, k_SKD, v_SKD, *ends, *sizes, scale=SCALE, window_size=(-1, 0), enable_gqa=True
        )

    return work


def fused(smoke: bool) -> Iterator[Entry]:
    """RoPE with write, and add with norm: ours, plain torch and torch.compile, GB/s."""
    device = device_of(smoke)
    options = {"dtype": torch.bfloat16, "device": device}
    for rows in (4,) if smoke else (1, 64, 2048):
        q = torch.randn(rows, HEADS, HEAD_DIM, **options)
        k, v = (torch.randn(rows, KV_HEADS, HEAD_DIM, **options) for _ in "kv")
        pools = [torch.zeros(KV_HEADS, 4096, HEAD_DIM, **options) for _ in "kv"]
        positions, slots = (
            torch.arange(rows, device=device),
            torch.randperm(4096, device=device)[:rows],
        )
        rotary = rotary_cos_sin(positions, RopeSpec(theta=500_000.0, dim=HEAD_DIM), q.dtype)
        arguments = q, k, v, *rotary, slots, *pools
        moved = 2 * 2 * (q.numel() + k.numel() + v.numel()) / 1e9
        yield from beside(
            f"rotate_and_write {rows}", rotate_and_write, rotate_then_write, arguments, moved, smoke
        )
        hidden, delta = (torch.randn(rows, WIDTH, **options) for _ in "ab")
        norm = hidden, delta, torch.ones(WIDTH, **options), 1e-5
        moved = 4 * 2 * hidden.numel() / 1e9
        yield from beside(f"add_rms_norm {rows}", add_rms_norm, add_then_norm, norm, moved, smoke)


def beside(
    name: str, ours: Any, original: Any, arguments: tuple[Any, ...], moved: float, smoke: bool
) -> Iterator[Entry]:
    """Our kernel, its torch original, and what the compiler makes of that."""
    works = {"triton": ours, "torch": original}
    if not smoke:
        works["compiled"] = torch.compile(original, dynamic=False)
    for kind, work in works.items():
        yield f"{name} {kind}", timed(partial(work, *arguments), smoke, "GB_s", moved)


def rotate_then_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *pools: Tensor
) -> Tensor:
    """What the model does."""
    pools[0].index_copy_(1, slots, rotate(k, cos, sin).transpose(0, 1))
    pools[1].index_copy_(1, slots, v.transpose(0, 1))
    return rotate(q, cos, sin)


def add_then_norm(
    hidden: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What the model does."""
    total = hidden + delta
    return total, F.rms_norm(total, weight.shape, weight, eps)
