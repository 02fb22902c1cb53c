"""Rows that are stored in another order turn as the stored order says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mnemosyne.model_zoo.rope import RopeSpec, inverse_frequencies, rotary_cos_sin
from mnemosyne.model_zoo.stored import Mxfp4, Ones, Reordered, Strided, Whole
from mnemosyne.model_zoo.tensors import row_order
from mnemosyne.operators import TORCH

HEAD_DIM, NUM_HEADS = 12, 3


def turned_as_stored(x_HD: Tensor, position: int, rope: RopeSpec) -> Tensor:
    """Each pair of the stored order turned by its angle, written out; other dims as they are."""
    y_HD = x_HD.clone()
    for pair, radians in enumerate(inverse_frequencies(rope).tolist()):
        i, j = (2 * pair, 2 * pair + 1) if rope.adjacent else (pair, pair + rope.dim // 2)
        angle = torch.tensor(position * radians, dtype=torch.float64)
        y_HD[:, i] = x_HD[:, i] * angle.cos() - x_HD[:, j] * angle.sin()
        y_HD[:, j] = x_HD[:, j] * angle.cos() + x_HD[:, i] * angle.sin()
    return y_HD


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("dim", [4, 6, 12])
def test_scores_are_those_of_the_stored_order(dim: int, adjacent: bool) -> None:
    rope = RopeSpec(theta=100.0, dim=dim, adjacent=adjacent)
    order = row_order(rope, HEAD_DIM) or tuple(range(HEAD_DIM))
    generator = torch.Generator().manual_seed(0)
    q_HD, k_HD = torch.randn(2, NUM_HEADS, HEAD_DIM, generator=generator, dtype=torch.float64)
    positions_T = torch.tensor([7, 3])

    tables = rotary_cos_sin(positions_T, rope, torch.float64, TORCH, head_dim=HEAD_DIM)
    q, k = TORCH.rotate(torch.stack((q_HD, k_HD))[:, :, list(order)], *tables)

    stored = turned_as_stored(q_HD, 7, rope) * turned_as_stored(k_HD, 3, rope)
    torch.testing.assert_close((q * k).sum(-1), stored.sum(-1), rtol=0, atol=1e-14)
    assert sorted(order) == list(range(HEAD_DIM))


def test_halves_of_whole_heads_need_no_other_order() -> None:
    assert row_order(RopeSpec(theta=100.0, dim=HEAD_DIM), HEAD_DIM) is None


@pytest.mark.parametrize(("start", "stop"), [(0, 36), (0, 1), (5, 17), (12, 24), (35, 36)])
def test_any_part_of_reordered_rows_is_that_part_of_the_whole(start: int, stop: int) -> None:
    order = row_order(RopeSpec(theta=100.0, dim=8, adjacent=True), HEAD_DIM)
    assert order is not None
    stored_XE = torch.arange(36.0)[:, None] + torch.arange(4) / 10
    source = Reordered("w", (36, 4), order)

    part = source.read(lambda name: stored_XE, (slice(start, stop), slice(1, 3)))

    whole = stored_XE.unflatten(0, (NUM_HEADS, HEAD_DIM))[:, list(order)].flatten(0, 1)
    assert torch.equal(part, whole[start:stop, 1:3])
    assert source.tensors() == Whole("w", (36, 4)).tensors() == {"w": (36, 4)}


def test_ones_are_read_from_nowhere() -> None:
    ones = Ones("w", (4,))

    assert ones.tensors() == {}
    assert torch.equal(ones.read(lambda name: None, (slice(1, 3),)), torch.ones(2))


@pytest.mark.parametrize("part", [(slice(0, 3), slice(0, 4), slice(0, 6)), (slice(1, 2),) * 3])
@pytest.mark.parametrize(("start", "step"), [(0, 1), (4, 1), (0, 2), (1, 2)])
def test_gate_and_up_are_told_apart_in_a_stack_of_both(
    part: tuple[slice, slice, slice], start: int, step: int
) -> None:
    stored_XEF = torch.arange(3 * 6 * 8.0).view(3, 6, 8)
    source = Strided("w", (3, 4, 6), (3, 6, 8), start=start, step=step, is_transposed=True)

    values = source.read(lambda name: stored_XEF, part)

    whole = stored_XEF[..., start::step][..., :4].transpose(1, 2)
    assert torch.equal(values, whole[part])


@pytest.mark.parametrize(("start", "step"), [(0, 1), (0, 2), (1, 2)])
def test_packed_numbers_are_those_of_transformers(start: int, step: int) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 8, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 8, 3), generator=generator, dtype=torch.uint8)
    stored = {"w_blocks": blocks, "w_scales": scales}
    source = Mxfp4("w", (2, 8 // step, 96), 8, start, step)

    values = source.read(lambda name: stored[name], (slice(0, 2), slice(1, 4), slice(5, 70)))

    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(values, theirs[:, start::step][:, 1:4, 5:70])
    assert torch.equal(values, values.bfloat16().float())
    assert source.tensors() == {name: tuple(t.shape) for name, t in stored.items()}
