"""A model shaped like Llama 4 Scout gives its definition on rows around position 10M."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.attention import choose_backend
from mnemosyne.attention.chunked import Chunked, Reach
from mnemosyne.attention.segments import AttentionBatch, Segment
from mnemosyne.cache.pages import PagePool
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.rope import inverse_frequencies
from mnemosyne.operators import TORCH
from mnemosyne.parallel.feed_forward import own_rows
from mnemosyne.parallel.mesh import Axis
from mnemosyne.runtime.inputs import StepInputs
from mnemosyne.runtime.step import LayerShape, PagedAttention
from mnemosyne.step_context import StepContext
from tests.model_zoo.families import tiny_family
from tests.model_zoo.test_decoder import load

CHUNK, PAGE, NUM_ROWS = 8192, 64, 8
LAST = 10_485_760  # positions of the longest model
FIRST = LAST - CHUNK - NUM_ROWS // 2  # of the rows: they lie on both sides of a chunk's boundary
POOL = 1 << 20  # slots: each holds the keys of ten positions that lie so far apart
CPU = torch.device("cpu")


class ByDefinition:
    """Attention over the same pool, keys counted as often as positions lie in their slot."""

    def __init__(self, pool: PagePool, positions_T: Tensor, reaches: list[Reach], scale: float):
        self.pool, self.positions_T, self.reaches, self.scale = pool, positions_T, reaches, scale

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        rotary: Any = None,
        sink_H: Tensor | None = None,
    ) -> Tensor:
        if rotary is not None:
            q_THD, k_TKD = TORCH.rotate(q_THD, *rotary), TORCH.rotate(k_TKD, *rotary)
        k_KSD, v_KSD = self.pool.k[layer][:, :POOL], self.pool.v[layer][:, :POOL]
        slots_T = self.positions_T % POOL
        k_KSD[:, slots_T], v_KSD[:, slots_T] = k_TKD.transpose(0, 1), v_TKD.transpose(0, 1)
        slots = torch.arange(POOL)
        rows = []
        for q_HD, position in zip(q_THD, self.positions_T.tolist(), strict=True):
            reach = self.reaches[layer]
            first = position // reach.size * reach.size if isinstance(reach, Chunked) else 0
            # how many positions from `first` to this row's lie in each slot
            counts_S = (position - slots).div(POOL, rounding_mode="floor") + 1
            counts_S -= (first - 1 - slots).div(POOL, rounding_mode="floor") + 1
            seen = counts_S.nonzero()[:, 0]
            scores_HS = self.scale * torch.einsum("hd,sd->hs", q_HD, k_KSD[0, seen])
            weights_HS = (scores_HS + counts_S[seen].double().log()).softmax(-1)
            rows.append(weights_HS @ v_KSD[0, seen])
        return torch.stack(rows)


def far_model(path: Path) -> Decoder:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    return load(
        tiny_family(
            path,
            "llama4",
            num_key_value_heads=1,
            head_dim=8,
            attention_chunk_size=CHUNK,
            floor_scale=8192,
            attn_scale=0.1,
            max_position_embeddings=LAST,
            rope_parameters=rope,
        )
    )


def filled_pool(num_layers: int) -> PagePool:
    pool = PagePool(
        num_pages=POOL // PAGE,
        page_size=PAGE,
        num_layers=num_layers,
        num_kv_heads=1,
        head_dim=8,
        dtype=torch.float64,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in (*pool.k, *pool.v):
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return pool


def far_inputs(positions_T: Tensor) -> StepInputs:
    num_keys = int(positions_T[-1]) + 1
    pages = np.arange(-(-num_keys // PAGE)) % (POOL // PAGE)
    segment = Segment(0, len(positions_T), int(positions_T[0]), num_keys, pages)
    return StepInputs(
        token_ids_T=positions_T % 96,
        positions_T=positions_T,
        slots_T=positions_T % POOL,
        batch=AttentionBatch((segment,), len(positions_T), PAGE),
        chunks=(),
    )


@torch.inference_mode()
def run(decoder: Decoder, inputs: StepInputs, attend: Any) -> Tensor:
    context = StepContext(attend, own_rows)
    return decoder.logits(decoder(inputs.token_ids_T, inputs.positions_T, context))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_around_position_ten_million_are_those_of_the_definition(tmp_path: Path) -> None:
    decoder = far_model(tmp_path)
    spec = decoder.spec
    inputs = far_inputs(torch.arange(FIRST, FIRST + NUM_ROWS))
    layers = LayerShape(windows=spec.reaches, scale=spec.scale_of_scores)
    backend = choose_backend("cpu", device=CPU, dtype=torch.float64, head_dim=8)

    paged = PagedAttention(filled_pool(4), backend, TORCH, inputs, layers=layers, kvp=Axis("kvp"))
    found_TV = run(decoder, inputs, paged)

    dense = ByDefinition(
        filled_pool(4), inputs.positions_T, list(spec.reaches), spec.scale_of_scores
    )
    expected_TV = run(decoder, inputs, dense)
    error = (found_TV - expected_TV).abs().max() / expected_TV.abs().max()
    assert spec.reaches[:4] == (Chunked(CHUNK),) * 3 + (None,)
    assert error < 1e-11, f"relative error {error:.2e}"


def test_angles_and_temperature_far_out_are_exact(tmp_path: Path) -> None:
    decoder = far_model(tmp_path)
    position = LAST - 1

    tables = decoder.rotary(torch.tensor([position]))

    turns = [layer.turns for layer in decoder.decoder_layers()]
    assert turns[0].q == turns[0].k
    assert turns[3].k is None
    cos_D = tables[turns[0].q or 0][0][0]
    exact_D = [math.cos(position * r) for r in inverse_frequencies(decoder.spec.rope).tolist()]
    assert cos_D.tolist() == pytest.approx(exact_D, abs=1e-12)
    assert turns[3].q is not None
    factor, nothing = (table[0] for table in tables[turns[3].q])
    assert factor.tolist() == pytest.approx([1 + 0.1 * math.log(1 + LAST // 8192)] * 4, rel=1e-15)
    assert nothing.tolist() == [0.0] * 4
