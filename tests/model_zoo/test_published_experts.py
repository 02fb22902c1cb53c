"""Published config.json of models of experts: what is read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mnemosyne.attention.chunked import Chunked
from mnemosyne.model_zoo.family import Temperature
from mnemosyne.model_zoo.router import Router
from mnemosyne.model_zoo.tensors import known_name, tensor_shapes
from tests.model_zoo.published_experts import (
    GLM_4_5_AIR,
    GPT_OSS_20B,
    LLAMA_4_SCOUT,
    MINIMAX_M2,
    MIXTRAL_8X7B,
    QWEN_2_57B_A14B,
    QWEN_3_30B_A3B,
)
from tests.model_zoo.test_spec import read


@pytest.mark.parametrize(
    ("config", "length", "experts"),
    [
        (QWEN_3_30B_A3B, 262_144, (128, 8)),
        (QWEN_2_57B_A14B, 131_072, (64, 8)),
        (MIXTRAL_8X7B, 32_768, (8, 2)),
        (GPT_OSS_20B, 131_072, (32, 4)),
        (GLM_4_5_AIR, 131_072, (128, 8)),
        (MINIMAX_M2, 196_608, (256, 8)),
        (LLAMA_4_SCOUT, 10_485_760, (16, 1)),
    ],
    ids=lambda value: value["architectures"][0] if isinstance(value, dict) else "",
)
def test_published_configs_are_read_with_the_length_they_promise(
    tmp_path: Path, config: dict[str, Any], length: int, experts: tuple[int, int]
) -> None:
    spec = read(tmp_path, config)

    assert spec.max_positions == length
    assert (spec.num_experts, spec.experts_per_token) == experts
    assert spec.dtype == "bfloat16"


def test_qwen_says_which_layers_have_experts_and_what_is_shared(tmp_path: Path) -> None:
    sparse = read(tmp_path, QWEN_3_30B_A3B, decoder_sparse_step=2, mlp_only_layers=[3])
    shared = read(tmp_path, QWEN_2_57B_A14B)

    assert set(sparse.dense_layers) == {*range(0, 48, 2), 3}
    assert (sparse.mlp_width, sparse.dense_width) == (768, 6144)
    assert sparse.router == Router(normed=True)
    assert (shared.shared_width, shared.gates_shared, shared.qkv_bias) == (20_480, True, True)


def test_gpt_oss_keeps_packed_experts_and_sinks(tmp_path: Path) -> None:
    spec = read(tmp_path, GPT_OSS_20B)
    shapes = tensor_shapes(spec)

    prefix = "model.layers.0.mlp.experts.gate_up_proj"
    assert shapes[f"{prefix}_blocks"] == (32, 5760, 90, 16)
    assert shapes[f"{prefix}_scales"] == (32, 5760, 90)
    assert shapes[f"{prefix}_bias"] == (32, 5760)
    assert shapes["model.layers.0.self_attn.sinks"] == (64,)
    assert spec.windows[:2] == (128, None)
    assert not spec.rope.truncate
    assert read(tmp_path, GPT_OSS_20B, quantization_config=None).expert_storage == "in turns"


def test_layers_that_predict_further_tokens_are_passed_over(tmp_path: Path) -> None:
    spec = read(tmp_path, GLM_4_5_AIR)

    assert known_name(spec, "model.layers.46.eh_proj.weight") is None
    assert known_name(spec, "model.layers.45.mlp.gate.weight") == "model.layers.45.mlp.gate.weight"
    assert known_name(spec, "model.layers.47.mlp.gate.weight") is not None
    assert spec.rope.dim == 64


def test_llama_4_sees_chunks_but_for_every_fourth_layer(tmp_path: Path) -> None:
    spec = read(tmp_path, LLAMA_4_SCOUT)

    assert spec.reaches[:4] == (Chunked(8192),) * 3 + (None,)
    assert [spec.is_tempered(layer) for layer in range(4)] == [False, False, False, True]
    assert [spec.has_qk_norm(layer) for layer in range(4)] == [True, True, True, False]
    assert spec.temperature == Temperature(0.1, 8192, shift=1, only_unturned=True)
    assert spec.rope.adjacent
    assert spec.dense_layers == ()
    assert "model.layers.0.self_attn.q_norm.weight" not in tensor_shapes(spec)


TEXT = LLAMA_4_SCOUT["text_config"]


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN_3_30B_A3B, {"use_sliding_window": True}, "use_sliding_window .* be false"),
        (QWEN_3_30B_A3B, {"mlp_only_layers": [48]}, "mlp_only_layers .* indices of the 48"),
        (QWEN_3_30B_A3B, {"num_experts": None}, "num_experts .* whole number >= 2"),
        (QWEN_3_30B_A3B, {"num_local_experts": 64}, "num_local_experts .* agree with num_exp"),
        (QWEN_3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok .* at most 128"),
        (QWEN_3_30B_A3B, {"quantization_config": {"a": 1}}, "quantization_config .* absent"),
        (QWEN_2_57B_A14B, {"shared_expert_intermediate_size": None}, "shared_expert.* whole"),
        (MIXTRAL_8X7B, {"num_local_experts": 1}, "num_local_experts .* >= 2"),
        (GPT_OSS_20B, {"swiglu_limit": 5.0}, "swiglu_limit .* be 7"),
        (GPT_OSS_20B, {"experts_per_token": 2}, "experts_per_token .* agree"),
        (
            GPT_OSS_20B,
            {"quantization_config": {"quant_method": "fp8"}},
            r"quantization_config\.quant_method .* be mxfp4, got 'fp8'",
        ),
        (
            GPT_OSS_20B,
            {"quantization_config": {"quant_method": "mxfp4", "novel": 1}},
            r"quantization_config\.novel .* absent",
        ),
        (GLM_4_5_AIR, {"n_group": 3}, "n_group .* divide 128 experts"),
        (GLM_4_5_AIR, {"n_group": 32, "topk_group": 1}, "topk_group .* leave 8 experts"),
        (GLM_4_5_AIR, {"partial_rotary_factor": 0.26}, "partial_rotary_factor .* even number"),
        (MINIMAX_M2, {"scoring_func": "softmax"}, "scoring_func .* be sigmoid"),
        (MINIMAX_M2, {"attn_type_list": [0] + [1] * 61}, "attn_type_list .* hold 1"),
        (MINIMAX_M2, {"shared_intermediate_size": 64}, "shared_intermediate_size .* be 0"),
        (MINIMAX_M2, {"quantization_config": {"a": 1}}, "quantization_config .* absent"),
        (
            LLAMA_4_SCOUT,
            {"text_config": TEXT | {"moe_layers": [48]}},
            r"text_config\.moe_layers .* indices",
        ),
        (
            LLAMA_4_SCOUT,
            {"text_config": TEXT | {"layer_types": ["sliding_attention"] * 48}},
            "layer_types .* hold full_attention or chunked",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_what_changes_the_mathematics_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, base, **changes)

    assert "; " in str(raised.value)  # a remedy follows
