"""RoPE fused with the write to pages: what rotating first and writing then would give."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mnemosyne.cache.pages import PagePool
from mnemosyne.kernels.rotate_and_write import element_offsets, rotate_and_write
from mnemosyne.model_zoo.rope import RopeSpec, rotary_cos_sin, rotate
from tests.attention.cases import assert_no_worse_than_eager

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROPES = {
    "default": RopeSpec(theta=500_000.0, dim=64),
    "llama3": RopeSpec(
        kind="llama3", theta=500_000.0, dim=64, factor=8.0, original_max_positions=8192
    ),
    "yarn": RopeSpec(
        kind="yarn",
        theta=10_000.0,
        dim=64,
        factor=4.0,
        original_max_positions=4096,
        attention_factor=1.14,
    ),
}


def make_pool(num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagePool:
    return PagePool(
        num_pages=6,
        page_size=8,
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        device=DEVICE,
    )


def make_step(
    num_rows: int, heads: tuple[int, int, int], rope: RopeSpec, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """Projections, cos and sin at far positions, and slots in random order; float64 or rounded."""
    num_kv_heads, group, head_dim = heads
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, num_kv_heads * (group + 2), head_dim, generator=generator)
    widths = (num_kv_heads * group, num_kv_heads, num_kv_heads)
    projections = list(x.to(DEVICE, dtype).split(widths, dim=1))  # rows lie apart
    positions = torch.randint(10_000_000, (num_rows,), generator=generator).to(DEVICE)
    slots = torch.randperm(6 * 8, generator=generator)[:num_rows].to(DEVICE)
    return projections, rotary_cos_sin(positions, rope, dtype), slots


def rotate_then_write(
    projections: list[Tensor], rotary: tuple[Tensor, Tensor], slots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The torch original: rotated q, and the pools of keys and values."""
    q, k, v = projections
    pool = make_pool(k.shape[1], k.shape[2], k.dtype)
    pool.write(0, slots, rotate(k, *rotary), v)
    return rotate(q, *rotary), pool.k[0], pool.v[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(2, 4, 64), (1, 5, 24), (9, 1, 16)])
@pytest.mark.parametrize("num_rows", [1, 7])
def test_it_is_no_worse_than_to_rotate_and_then_write(
    num_rows: int, heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    rope = RopeSpec(theta=10_000.0, dim=heads[2])
    projections, rotary, slots = make_step(num_rows, heads, rope, dtype)
    pool = make_pool(heads[0], heads[2], dtype)

    q = rotate_and_write(*projections, *rotary, slots, pool.k[0], pool.v[0])

    eager = rotate_then_write(projections, rotary, slots)
    wide = [x.double() for x in projections], (rotary[0].double(), rotary[1].double()), slots
    for ours, theirs, exact in zip(
        (q, pool.k[0], pool.v[0]), eager, rotate_then_write(*wide), strict=True
    ):
        assert_no_worse_than_eager(ours, theirs, exact)
    assert torch.equal(pool.v[0], eager[2])


@pytest.mark.parametrize("kind", ROPES)
def test_every_kind_of_rotation_is_served(kind: str) -> None:
    projections, rotary, slots = make_step(5, (2, 2, 64), ROPES[kind], torch.float64)
    pool = make_pool(2, 64, torch.float64)

    q = rotate_and_write(*projections, *rotary, slots, pool.k[0], pool.v[0])

    expected = rotate_then_write(projections, rotary, slots)
    for ours, theirs in zip((q, pool.k[0], pool.v[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_padding_rows_touch_their_own_slot_alone() -> None:
    rope = RopeSpec(theta=10_000.0, dim=16)
    projections, rotary, slots = make_step(6, (2, 2, 16), rope, torch.float64)
    pool = make_pool(2, 16, torch.float64)
    slots[4:] = pool.padding_slot

    q = rotate_and_write(*projections, *rotary, slots, pool.k[0], pool.v[0])

    expected = rotate_then_write(projections, rotary, slots)
    torch.testing.assert_close(q, expected[0], rtol=0, atol=1e-14)
    for ours, theirs in ((pool.k[0], expected[1]), (pool.v[0], expected[2])):
        ends = pool.padding_slot
        torch.testing.assert_close(ours[:, :ends], theirs[:, :ends], rtol=0, atol=1e-14)
        assert not ours[:, ends + 1 :].any()


def test_no_rows_are_no_work() -> None:
    rope = RopeSpec(theta=10_000.0, dim=16)
    projections, rotary, slots = make_step(0, (2, 2, 16), rope, torch.float32)
    pool = make_pool(2, 16, torch.float32)

    q = rotate_and_write(*projections, *rotary, slots, pool.k[0], pool.v[0])

    assert q.shape == (0, 4, 16)
    assert not pool.k[0].any()


@triton.jit
def offsets_kernel(slots, stride_s, stride_pool, result, NUM_HEADS: tl.constexpr):
    head = tl.arange(0, NUM_HEADS)
    offsets = element_offsets(tl.load(slots), head, stride_s, stride_pool)
    tl.store(result + head, offsets)


def test_offsets_pass_31_bits() -> None:
    slots = torch.tensor([2**26 + 3], device=DEVICE)
    result = torch.zeros(4, dtype=torch.int64, device=DEVICE)

    # strides that fit 31 bits arrive as int32: their products must not stay there
    offsets_kernel[(1,)](slots, 128, 2**30, result, NUM_HEADS=4)

    expected = (2**26 + 3) * 128 + torch.arange(4) * 2**30
    assert expected.min() > 2**31
    assert torch.equal(result.cpu(), expected)
