"""config.json: published ones are read, what is not implemented is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec, read_spec
from tests.model_zoo.published import (
    LLAMA_2_7B,
    LLAMA_3_2_1B,
    LLAMA_3_8B,
    MISTRAL_7B_V1,
    MISTRAL_NEMO,
    QWEN_2_5_7B,
    QWEN_3_0_6B,
)


def read(path: Path, base: dict[str, Any], **changes: Any) -> ModelSpec:
    """The spec of a published config with some entries changed; ``...`` drops one."""
    config = {name: value for name, value in (base | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_spec(path)


def test_llama_2_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_2_7B) == ModelSpec(
        family="llama",
        vocab_size=32000,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        mlp_width=11008,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10_000.0, dim=128),
        tied=False,
        windows=(None,) * 32,
        max_positions=4096,
        dtype="float16",
    )


def test_llama_3_2_is_read(tmp_path: Path) -> None:
    spec = read(tmp_path, LLAMA_3_2_1B)

    assert (spec.tied, spec.head_dim, spec.num_kv_heads) == (True, 64, 8)
    assert spec.max_positions == 131_072
    assert spec.rope == RopeSpec(
        kind="llama3",
        theta=500_000.0,
        dim=64,
        factor=32.0,
        original_max_positions=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (LLAMA_3_8B, {None}),
        (MISTRAL_7B_V1, {4096}),
        (MISTRAL_NEMO, {None}),
        (QWEN_2_5_7B, {None}),
        (QWEN_3_0_6B, {None}),
    ],
    ids=["llama-3", "mistral-7b-v0.1", "nemo", "qwen-2.5", "qwen-3"],
)
def test_published_windows_are_read(
    tmp_path: Path, config: dict[str, Any], windows: set[int | None]
) -> None:
    spec = read(tmp_path, config)

    assert set(spec.windows) == windows
    assert len(spec.windows) == spec.num_layers


def test_heads_apart_from_the_width_are_read(tmp_path: Path) -> None:
    nemo = read(tmp_path, MISTRAL_NEMO)
    qwen = read(tmp_path, QWEN_3_0_6B)

    assert nemo.head_dim * nemo.num_heads == 4096 != nemo.width
    assert (qwen.head_dim, qwen.qk_norm, qwen.qkv_bias) == (128, True, False)


def test_qwen_2_has_biases_on_q_k_and_v_alone(tmp_path: Path) -> None:
    spec = read(tmp_path, QWEN_2_5_7B)

    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == (True, False, False)


def test_qwen_reaches_its_stretched_length_under_yarn(tmp_path: Path) -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

    spec = read(tmp_path, QWEN_2_5_7B, rope_scaling=yarn)

    assert spec.max_positions == 131_072


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None, None, None, None)),
        ({"use_sliding_window": True}, (None, None, 16, 16)),
        ({"use_sliding_window": True, "sliding_window": None}, (None,) * 4),
        (
            {
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (16, None, 16, None),
        ),
        ({"layer_types": ["full_attention"] * 4}, (None,) * 4),
    ],
    ids=str,
)
def test_windows_by_layer_are_those_of_transformers(
    tmp_path: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    sizes = {"num_hidden_layers": 4, "sliding_window": 16, "max_window_layers": 2}
    spec = read(tmp_path, QWEN_3_0_6B, **(sizes | changes))
    peer = transformers.AutoConfig.from_pretrained(tmp_path)

    kinds = [
        peer.sliding_window if kind == "sliding_attention" else None for kind in peer.layer_types
    ]
    assert spec.windows == windows == tuple(kinds)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_configs_that_transformers_writes_are_read(tmp_path: Path, family: str) -> None:
    config = getattr(transformers, f"{family}Config")(dtype="bfloat16")
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)

    spec = read_spec(tmp_path)

    assert spec.family == family.lower()
    assert spec.dtype == "bfloat16"
    assert spec.norm_eps == config.rms_norm_eps
    assert spec.max_positions == config.max_position_embeddings


def test_absent_and_null_sizes_follow_from_the_others(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        LLAMA_3_8B,
        num_key_value_heads=None,
        head_dim=None,
        rope_theta=...,
        torch_dtype=...,
        architectures=...,
    )

    assert (spec.num_kv_heads, spec.head_dim) == (32, 128)
    assert (spec.rope.theta, spec.dtype) == (10_000.0, "float32")


def test_unknown_entries_that_say_nothing_are_harmless(tmp_path: Path) -> None:
    spec = read(tmp_path, LLAMA_3_8B, novel=None, mystery=False, extras={}, pruned=[])

    assert spec == read(tmp_path, LLAMA_3_8B)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (LLAMA_3_8B, {"hidden_act": "gelu"}, "hidden_act .* must be silu or .* got 'gelu'"),
        (LLAMA_3_8B, {"pretraining_tp": 2}, "pretraining_tp .* must be 1, got 2"),
        (LLAMA_3_8B, {"quantization_config": {"bits": 4}}, "quantization_config .* absent"),
        (LLAMA_3_8B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor .* must be 1"),
        (LLAMA_3_8B, {"sliding_window": 512}, "sliding_window .* absent or null, got 512"),
        (LLAMA_3_8B, {"residual_multiplier": 0.5}, "residual_multiplier .* absent"),
        (LLAMA_3_8B, {"novel_zero": 0}, "novel_zero .* absent"),
        (LLAMA_3_8B, {"per_layer_config": {"0": {}}}, "per_layer_config .* absent"),
        (LLAMA_3_8B, {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map .* absent"),
        (LLAMA_3_8B, {"torch_dtype": "float8_e4m3fn"}, "dtype .* must be one of float64"),
        (LLAMA_3_8B, {"hidden_size": ...}, "hidden_size .* whole number >= 1, got None"),
        (LLAMA_3_8B, {"num_hidden_layers": 0}, "num_hidden_layers .* >= 1, got 0"),
        (LLAMA_3_8B, {"num_attention_heads": "32"}, "num_attention_heads .* got '32'"),
        (LLAMA_3_8B, {"num_key_value_heads": 5}, "num_heads must be a multiple .* got 32"),
        (LLAMA_3_8B, {"head_dim": 63}, "head_dim must be even, got 63"),
        (LLAMA_3_8B, {"rms_norm_eps": -1.0}, "rms_norm_eps .* positive number, got -1"),
        (LLAMA_3_8B, {"rms_norm_eps": float("nan")}, "rms_norm_eps .* must be finite .* got nan"),
        (LLAMA_3_8B, {"attention_bias": "yes"}, "attention_bias .* true or false, got 'yes'"),
        (LLAMA_3_8B, {"model_type": "mistral"}, "model_type .* must be llama"),
        (MISTRAL_NEMO, {"attention_bias": True}, "attention_bias .* absent"),
        (MISTRAL_NEMO, {"layer_types": ["full_attention"] * 40}, "layer_types .* absent"),
        (MISTRAL_NEMO, {"sliding_window": 0}, "sliding_window .* >= 1, got 0"),
        (QWEN_3_0_6B, {"layer_types": ["full_attention"]}, "layer_types .* each of 28 layers"),
        (QWEN_3_0_6B, {"layer_types": ["linear_attention"] * 28}, "layer_types .* hold full"),
        (QWEN_3_0_6B, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window is true"),
        (QWEN_2_5_7B, {"use_mrope": True}, "use_mrope .* absent"),
        (QWEN_2_5_7B, {"dual_chunk_attention_config": {"a": 1}}, "dual_chunk.* absent"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_what_changes_the_mathematics_is_refused_by_name(
    tmp_path: Path, base: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, base, **changes)

    assert "; " in str(raised.value)  # a remedy follows


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**5}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"vocab_size": 2**63}, "vocab_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"intermediate_size": 10**9}, "intermediate_size"),
        ({"num_attention_heads": 10**6}, "num_attention_heads"),
        ({"num_key_value_heads": 10**6}, "num_key_value_heads"),
        ({"head_dim": 10**9}, "head_dim"),
        ({"max_position_embeddings": 10**18}, "max_position_embeddings"),
        ({"rms_norm_eps": 10**39}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"architectures": None, "model_type": ["llama"]}, "architectures"),
        ({"torch_dtype": ["bfloat16"]}, "dtype"),
        ({"torch_dtype": {}, "dtype": {"a": 1}}, "dtype"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e39}}, "rope_scaling.factor"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e30}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": {**YARN, "beta_slow": 1e-30}}, "rope_scaling.beta_slow"),
        ({"rope_scaling": {**YARN, "rope_theta": 1.0}}, "rope_scaling.rope_theta"),
        ({"rope_scaling": {**YARN, "attention_factor": 1e39}}, "rope_scaling.attention_factor"),
    ],
    ids=str,
)
def test_absurd_values_are_refused_by_the_name_of_their_entry(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(named)} in .*config\.json must ") as caught:
        read(tmp_path, LLAMA_3_8B, **changes)

    assert len(str(caught.value)) < 400


def test_two_entries_for_one_thing_must_agree(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA_3_8B, dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"torch_dtype .* must agree with dtype, got 'bfloat16'"):
        read(tmp_path, LLAMA_3_8B, dtype="float32")

    both = {"type": "linear", "rope_type": "linear", "factor": 2.0}
    assert read(tmp_path, LLAMA_3_8B, rope_scaling=both).rope.factor == 2.0
    with pytest.raises(ValueError, match=r"rope_scaling\.type .* agree with rope_type, got 'yarn'"):
        read(tmp_path, LLAMA_3_8B, rope_scaling={**both, "type": "yarn"})


def test_names_of_entries_are_shown_harmlessly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="absent or null") as caught:
        read(tmp_path, LLAMA_3_8B, **{"\x1b[2J\n" + "a" * 10_000: "\x1b[31m"})

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_bookkeeping_of_older_full_dumps_is_neutral(tmp_path: Path) -> None:
    dumped = {
        "cls_token_id": 1,
        "unk_token_id": 0,
        "sep_token_id": 2,
        "_model_name_or_path": "somewhere/else",
        "encoder_no_repeat_ngram_size": 0,
        "remove_invalid_values": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.001,
        "is_encoder_decoder": False,
        "bad_words_ids": None,
        "pruned_heads": {},
    }

    assert read(tmp_path, LLAMA_3_8B, **dumped) == read(tmp_path, LLAMA_3_8B)


LLAMA3_ROPE = LLAMA_3_2_1B["rope_scaling"]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type .* default, linear.* got 'dynamic'"),
        ({"type": "longrope"}, "rope_type .* got 'longrope'"),
        ({"type": "mrope", "mrope_section": [1]}, "rope_type .* got 'mrope'"),
        ({"type": "linear"}, "rope_scaling.factor .* positive number, got None"),
        ({"type": "linear", "factor": 0}, "rope_scaling.factor .* positive number, got 0"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "rope_scaling.beta_fast .* absent"),
        ({"type": "default", "factor": 2.0}, "rope_scaling.factor .* absent"),
        ({"type": "yarn", "factor": 2.0, "finetuned": True}, "rope_scaling.finetuned .* absent"),
        ({"type": "yarn", "truncate": 1}, "rope_scaling.truncate .* true or false"),
        ({**LLAMA3_ROPE, "high_freq_factor": 0.5}, "high_freq_factor .* at least low_freq_factor"),
        ({**LLAMA3_ROPE, "low_freq_factor": None}, "low_freq_factor .* positive number"),
        ({"type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor .* be 1"),
        (["yarn"], "rope_scaling .* be an object"),
    ],
    ids=str,
)
def test_rotary_entries_that_are_not_implemented_are_refused_by_name(
    tmp_path: Path, rope: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, LLAMA_3_8B, rope_scaling=rope)


def test_two_forms_of_rope_must_agree(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0}

    same = read(tmp_path, LLAMA_3_8B, rope_scaling=rope, rope_parameters=rope)

    assert same.rope.factor == 2.0
    with pytest.raises(ValueError, match=r"rope_scaling .* agree with rope_parameters"):
        read(tmp_path, LLAMA_3_8B, rope_scaling=rope, rope_parameters={**rope, "factor": 4.0})


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None, "model_type": None},
        {"architectures": ..., "model_type": "mamba"},
        {"architectures": "LlamaForCausalLM"},
    ],
    ids=str,
)
def test_an_unknown_architecture_is_refused_and_the_known_ones_named(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"architectures .* Llama, .*, Qwen3, .* with ForCausalLM"):
        read(tmp_path, LLAMA_3_8B, **changes)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a path that exists, got .*nowhere"):
        read_spec(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "config.json", "model.gguf"])
def test_what_is_not_a_checkpoint_directory_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name:
        path.write_text("{}", encoding="utf-8")

    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*not a checkpoint"):
        read_spec(path)


@pytest.mark.parametrize("content", [b'{"vocab', b"\xff\xfe\x00", b"[1, 2]", b""])
def test_a_config_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(
        ValueError, match=r"config\.json must (be valid JSON|be UTF-8|hold a JSON obj)"
    ):
        read_spec(tmp_path)


def test_a_spec_keeps_its_own_rules() -> None:
    spec = ModelSpec(
        family="llama",
        vocab_size=8,
        width=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        mlp_width=8,
        norm_eps=1e-5,
        rope=RopeSpec(theta=10_000.0, dim=4),
        tied=True,
        windows=(None,),
        max_positions=8,
        dtype="float32",
    )

    with pytest.raises(ValueError, match="windows must hold one entry for each of 2 layers"):
        dataclasses.replace(spec, num_layers=2)
