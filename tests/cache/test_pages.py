"""Claims about the tensors of the cache."""

import numpy as np
import torch

from mnemosyne.cache.pages import PagePool


def _pool(dtype=torch.float32):
    return PagePool(
        num_pages=4,
        page_size=8,
        num_layers=2,
        num_kv_heads=3,
        head_dim=5,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def test_cleared_pages_hold_no_nan():
    pool = _pool()
    pool.k[0][:, 8:24] = pool.v[0][:, 8:24] = float("nan")

    pool.clear(np.array([2, 1]))

    assert not pool.k[0].any()
    assert not pool.v[0].any()


def test_a_copied_page_holds_what_the_other_does_in_every_layer():
    pool = _pool()
    for part in (*pool.k, *pool.v):
        part.copy_(torch.randn(part.shape))
    before = [part.clone() for part in (*pool.k, *pool.v)]

    pool.copy([3], [1])

    for part, old in zip((*pool.k, *pool.v), before, strict=True):
        assert torch.equal(part[:, 8:16], old[:, 24:32])
        old[:, 8:16] = old[:, 24:32]
        assert torch.equal(part, old)


def test_a_pool_takes_no_memory_before_it_is_written():
    resident_kb = _resident_kb()

    pool = PagePool(
        num_pages=2**15,
        page_size=128,
        num_layers=1,
        num_kv_heads=2,
        head_dim=128,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )  # 4 GiB declared

    assert pool.k[0].numel() * 2 > 2**31
    assert _resident_kb() - resident_kb < 2**17


def _resident_kb() -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
