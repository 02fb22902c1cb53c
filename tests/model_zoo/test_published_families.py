"""Published config.json of the further families: what is read, and what is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.model_zoo.family import Temperature
from tests.model_zoo.published_families import (
    GEMMA_3_1B,
    GEMMA_3_4B,
    MINISTRAL_3_8B,
    MISTRAL_SMALL_3_1,
    OLMO3_7B,
    SEED_OSS_36B,
    SMOLLM3_3B,
)
from tests.model_zoo.test_spec import read


@pytest.mark.parametrize(
    ("config", "family", "length"),
    [
        (SEED_OSS_36B, "seed_oss", 524_288),
        (SMOLLM3_3B, "smollm3", 65_536),
        (OLMO3_7B, "olmo3", 65_536),
        (GEMMA_3_1B, "gemma3_text", 32_768),
        (GEMMA_3_4B, "gemma3_text", 131_072),
        (MISTRAL_SMALL_3_1, "mistral", 131_072),
        (MINISTRAL_3_8B, "ministral3", 262_144),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_configs_are_read_with_the_length_they_promise(
    tmp_path: Path, config: dict[str, Any], family: str, length: int
) -> None:
    spec = read(tmp_path, config)

    assert (spec.family, spec.max_positions, spec.dtype) == (family, length, "bfloat16")


def test_seed_oss_has_no_bias_on_its_output(tmp_path: Path) -> None:
    spec = read(tmp_path, SEED_OSS_36B)

    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, False, False)


def test_every_fourth_layer_of_smollm3_turns_nothing(tmp_path: Path) -> None:
    spec = read(tmp_path, SMOLLM3_3B)

    assert [index for index in range(36) if spec.rope_of(index) is None] == [*range(3, 36, 4)]
    assert read(tmp_path, SMOLLM3_3B, no_rope_layers=None) == spec
    assert spec.tied


def test_only_full_layers_of_olmo3_are_stretched(tmp_path: Path) -> None:
    spec = read(tmp_path, OLMO3_7B)

    kinds = [rope.kind for rope in spec.ropes if rope is not None]
    assert kinds == (["default"] * 3 + ["yarn"]) * 8
    assert spec.windows == ((4096,) * 3 + (None,)) * 8
    assert (spec.norms, spec.qk_norm_over) == ("after", "row")


def test_gemma_has_a_rotation_and_a_window_by_kind_of_layer(tmp_path: Path) -> None:
    small, half = read(tmp_path, GEMMA_3_1B), read(tmp_path, GEMMA_3_4B)

    assert small.windows[:6] == (512,) * 5 + (None,)
    assert [rope.theta for rope in small.ropes[4:6] if rope] == [10_000.0, 1_000_000.0]
    assert [(rope.kind, rope.factor) for rope in half.ropes[4:6] if rope] == [
        ("default", 1.0),
        ("linear", 8.0),
    ]
    assert small.scale_of_scores == 1 / 16
    assert small.embed_scale == math.sqrt(1152)
    assert (half.num_heads, half.num_kv_heads, half.head_dim, half.tied) == (8, 4, 256, True)
    assert half.is_text_half


def test_ministral_sharpens_its_scores_with_the_position(tmp_path: Path) -> None:
    spec = read(tmp_path, MINISTRAL_3_8B)

    assert spec.temperature == Temperature(gain=0.1, span=16_384)
    assert spec.rope.attention_factor == 1.0
    assert not spec.tied


TEXT = MINISTRAL_3_8B["text_config"]
ROPE = TEXT["rope_parameters"]


def test_devstral_2_sharpens_nothing(tmp_path: Path) -> None:
    rope = ROPE | {
        "beta_fast": 4.0,
        "factor": 64.0,
        "llama_4_scaling_beta": 0.0,
        "mscale_all_dim": 0.0,
        "original_max_position_embeddings": 4096,
    }
    changes = {"architectures": ["Ministral3ForCausalLM"], "rope_parameters": rope}

    spec = read(tmp_path, TEXT | changes)

    assert spec.temperature is None
    assert spec.max_positions == 262_144
    assert spec.rope.attention_factor == pytest.approx(0.1 * math.log(64) + 1)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (SEED_OSS_36B, {"pretraining_tp": 2}, "pretraining_tp .* must be 1"),
        (SEED_OSS_36B, {"sliding_window": 64}, "sliding_window .* absent"),
        (SMOLLM3_3B, {"no_rope_layers": [1, 0]}, "no_rope_layers .* each of 36 layers"),
        (SMOLLM3_3B, {"no_rope_layers": [2] * 36}, "no_rope_layers .* hold 0 or 1"),
        (SMOLLM3_3B, {"layer_types": ["chunked_attention"] * 36}, "layer_types .* hold full"),
        (OLMO3_7B, {"sliding_window": None}, "sliding_window .* whole number"),
        (OLMO3_7B, {"clip_qkv": 8.0}, "clip_qkv .* absent"),
        (OLMO3_7B, {"rope_parameters": {"full_attention": {"a": 1}}}, "rope_scaling .* beside"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping .* absent"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional.* absent"),
        (GEMMA_3_1B, {"hidden_activation": "gelu"}, "hidden_activation .* got 'gelu'"),
        (GEMMA_3_1B, {"hidden_act": "relu"}, "hidden_act .* absent"),
        (GEMMA_3_1B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar .* positive"),
        (
            GEMMA_3_1B,
            {"rope_parameters": {"linear_attention": {"rope_type": "default"}}},
            r"rope_parameters\.linear_attention .* absent",
        ),
        (GEMMA_3_4B, {"text_config": None}, "text_config .* describe the text half"),
        (GEMMA_3_4B, {"model_type": "gemma3n"}, "model_type .* be gemma3 for Gemma3ForCond"),
        (GEMMA_3_4B, {"novel": 1}, "novel .* absent"),
        (GEMMA_3_4B, {"quantization_config": {"bits": 4}}, "quantization_config .* absent"),
        (
            GEMMA_3_4B,
            {"text_config": {"model_type": "mistral"}},
            r"text_config\.model_type .* be one of gemma3_text",
        ),
        (
            MINISTRAL_3_8B,
            {"text_config": TEXT | {"novel": 1}},
            r"text_config\.novel .* absent",
        ),
        (
            MINISTRAL_3_8B,
            {"text_config": TEXT | {"rope_parameters": None}},
            "rope_parameters .* describe the rotation",
        ),
        (
            MINISTRAL_3_8B,
            {"text_config": TEXT | {"rope_parameters": ROPE | {"llama_4_scaling_beta": None}}},
            "llama_4_scaling_beta .* positive number",
        ),
        (
            MINISTRAL_3_8B,
            {"text_config": TEXT | {"rope_parameters": ROPE | {"novel": 2}}},
            r"rope_parameters\.novel .* absent",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_what_changes_the_mathematics_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, base, **changes)

    assert "; " in str(raised.value)  # a remedy follows
