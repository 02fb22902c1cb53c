"""Rules of Triton for a tile hold for every candidate, on GPUs that nobody has here as well."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.kernels.configs import configs_for


@pytest.mark.parametrize("kind", ["decode", "chunk"])
@pytest.mark.parametrize("capability", [None, 8, 9, 10])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_and_warps_are_powers_of_two_and_tiles_fill_a_tensor_core(
    kind: str, capability: int | None, dtype: torch.dtype
) -> None:
    for head_dim in (64, 128, 256):
        for page_size in (16, 64, 128):
            configs = configs_for(kind, dtype, head_dim, page_size, capability)
            assert configs
            for config in configs:
                for count in (config.block_m, config.block_n, config.num_warps):
                    assert count.bit_count() == 1, config
                assert min(config.block_m, config.block_n) >= 16, config
                assert config.num_warps * 32 <= 1024, config
