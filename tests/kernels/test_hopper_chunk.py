"""Chunks by specialized warps, which run on Hopper alone: whole blocks and what is left of them."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.attention.triton import TritonBackend
from mnemosyne.kernels.configs import configs_for, shape_key
from tests.attention.cases import Rows, assert_no_worse_than_eager, make_case

# Keys beyond whole blocks, keys cut over several items, a shard of each kind, a lone decode.
LONG = (
    Rows(300, 2000),
    Rows(40, 5000),
    Rows(64, 2560, key_stop=1500),
    Rows(64, 2560, first_key=1000),
    Rows(70, 2000, key_stop=1990, first_key=128),
    Rows(1, 1300),
    Rows(33, 0),
)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_specialized_warps_are_no_worse_than_eager(
    dtype: torch.dtype, head_dim: int, group: int
) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    config = configs_for("chunk", dtype, head_dim, 128, 9)[0]
    assert config.specialized
    case = make_case(LONG, heads=(2, group, head_dim), page_size=128, unused=1e4).to(dtype, "cuda")
    backend = TritonBackend({shape_key("chunk", head_dim, 128): config})
    prepared = backend.prepare(case.batch, None, case.q_THD.device)

    out, lse = backend.attend(
        case.q_THD, case.k_KSD, case.v_KSD, prepared, scale=case.scale, return_lse=True
    )

    assert any(len(tiles.whole_items) for tiles in prepared.tiles.values())
    exact_out, exact_lse = case.to(torch.float64, "cuda").dense()
    eager_out, eager_lse = case.dense()
    assert_no_worse_than_eager(out, eager_out, exact_out)
    assert lse is not None
    assert torch.equal(lse.isneginf(), exact_lse.isneginf())
    seen = ~lse.isneginf()
    assert_no_worse_than_eager(lse[seen], eager_lse[seen], exact_lse[seen])


def test_they_are_for_hopper_pages_that_hold_a_block_and_two_head_dims() -> None:
    def is_specialized(head_dim: int, page_size: int, capability: int) -> bool:
        configs = configs_for("chunk", torch.bfloat16, head_dim, page_size, capability)
        return any(config.specialized for config in configs)

    assert is_specialized(128, 128, 9)
    assert is_specialized(64, 256, 9)
    assert not is_specialized(128, 64, 9)
    assert not is_specialized(96, 128, 9)
    assert not is_specialized(128, 128, 8)
    assert not is_specialized(128, 128, 10)
