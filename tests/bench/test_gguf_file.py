"""A checkpoint as a GGUF file: its own values, read back by the libraries that read such files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mnemosyne.bench.gguf_file import check_carried, gguf_file, write_gguf
from mnemosyne.model_zoo.rope import inverse_frequencies
from mnemosyne.model_zoo.spec import ModelSpec, read_spec
from tests.model_zoo.tiny import ROPES, tiny_checkpoint

gguf = pytest.importorskip("gguf", reason="the extra smollm2 is not installed")


def narrow_checkpoint(path: Path, **choices: Any) -> ModelSpec:
    """A tiny checkpoint in float32; GGUF has no float64 that llama.cpp computes in."""
    tiny_checkpoint(path, **choices)
    file = path / "model.safetensors"
    save_file({name: w.float() for name, w in load_file(file).items()}, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return read_spec(path)


def fields(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader: Any) -> dict[str, np.ndarray]:
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize(
    ("family", "choices", "architecture"),
    [
        ("llama", {"bias": True, "tied": True}, "llama"),
        ("llama", {"head_dim": 16}, "llama"),
        ("mistral", {}, "llama"),
        ("qwen2", {}, "qwen2"),
        ("qwen3", {"tied": True}, "qwen3"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_and_size_is_there(
    tmp_path: Path, family: str, choices: dict[str, Any], architecture: str, dtype: str
) -> None:
    spec = narrow_checkpoint(tmp_path, family=family, **choices)
    write_gguf(spec, tmp_path, dtype, tmp_path / "model.gguf")

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    known, found = fields(reader), tensors(reader)

    assert known["general.architecture"] == architecture
    assert {
        name: known[f"{architecture}.{name}"]
        for name in (
            *("context_length", "embedding_length", "block_count", "feed_forward_length"),
            *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
            *("attention.value_length", "rope.dimension_count", "vocab_size"),
        )
    } == {
        "context_length": spec.max_positions,
        "embedding_length": spec.width,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.mlp_width,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.head_dim,
        "vocab_size": spec.vocab_size,
    }
    assert known[f"{architecture}.attention.layer_norm_rms_epsilon"] == pytest.approx(spec.norm_eps)
    stored = load_file(tmp_path / "model.safetensors")
    stored = {name: w for name, w in stored.items() if not (spec.tied and name == "lm_head.weight")}
    assert len(found) == len(stored)
    rounded = stored["model.layers.1.mlp.down_proj.weight"].to(getattr(torch, dtype)).float()
    assert np.array_equal(found["blk.1.ffn_down.weight"], rounded.numpy())
    norms = stored["model.layers.0.input_layernorm.weight"].numpy()
    assert np.array_equal(found["blk.0.attn_norm.weight"], norms)


@pytest.mark.parametrize(
    ("family", "choices"),
    [("llama", {"head_dim": 16, "tied": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_transformers_reads_the_same_weights(
    tmp_path: Path, family: str, choices: dict[str, Any]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    spec = narrow_checkpoint(tmp_path, family=family, **choices)
    write_gguf(spec, tmp_path, "float32", tmp_path / "model.gguf")
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(tmp_path)
        dummy = AutoModelForCausalLM.from_config(config)

    read = load_gguf_checkpoint(
        str(tmp_path / "model.gguf"), return_tensors=True, model_to_load=dummy
    )

    stored = load_file(tmp_path / "model.safetensors")
    found = read["tensors"]
    assert found.keys() >= stored.keys() - {"lm_head.weight"}
    for name in found.keys() & stored.keys():
        assert torch.equal(torch.as_tensor(found[name]), stored[name]), name
    assert read["config"]["hidden_size"] == spec.width
    assert read["config"]["rms_norm_eps"] == pytest.approx(spec.norm_eps)


@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("form", ["new", "old"])
def test_rotation_is_that_of_the_checkpoint(tmp_path: Path, rope: str, form: str) -> None:
    tiny_checkpoint(tmp_path, rope=rope, rope_form=form)
    spec = read_spec(tmp_path)
    write_gguf(spec, tmp_path, "bfloat16", tmp_path / "model.gguf")

    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    known, found = fields(reader), tensors(reader)

    assert known["llama.rope.freq_base"] == 10_000.0
    scaling = {k.split("scaling.")[1]: v for k, v in known.items() if ".rope.scaling." in k}
    if rope == "linear":
        assert scaling == {"type": "linear", "factor": 2.5}
    elif rope == "yarn":
        assert scaling == {
            "type": "yarn",
            "factor": 8.0,
            "original_context_length": ROPES["yarn"]["original_max_position_embeddings"],
            "yarn_beta_fast": 32.0,
            "yarn_beta_slow": 1.0,
        }
    else:
        assert scaling == {}
    assert ("rope_freqs.weight" in found) == (rope == "llama3")
    if rope == "llama3":  # llama.cpp divides the plain angles by them
        plain = 10_000.0 ** (-np.arange(spec.head_dim // 2) * 2 / spec.head_dim)
        turned = plain / found["rope_freqs.weight"]
        assert turned == pytest.approx(inverse_frequencies(spec.rope).numpy(), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "choices", "named"),
    [
        ("mistral", {"window": 16}, "windows must be one that llama.cpp has for mistral, got 16"),
        ("qwen2", {"rope": "llama3"}, "rope.kind must"),
        ("qwen3", {"bias": True}, "o_bias must"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_by_name(
    tmp_path: Path, family: str, choices: dict[str, Any], named: str
) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, family=family, **choices))

    with pytest.raises(ValueError, match=named):
        check_carried(spec, "bfloat16")


def test_yarn_with_values_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, rope="yarn"))
    check_carried(spec, "float16")
    assert spec.rope.attention_factor == pytest.approx(0.1 * math.log(8) + 1)

    for changed, named in (
        (replace(spec.rope, attention_factor=1.0), r"rope\.attention_factor must"),
        (replace(spec.rope, truncate=False), r"rope\.truncate must"),
    ):
        with pytest.raises(ValueError, match=named):
            check_carried(replace(spec, rope=changed), "float16")
    with pytest.raises(ValueError, match=r"dtype must be .* got 'float64'"):
        check_carried(spec, "float64")


def test_the_file_is_kept_until_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = narrow_checkpoint(tmp_path / "model")

    first = gguf_file(spec, tmp_path / "model", "auto")
    again = gguf_file(spec, tmp_path / "model", "auto")
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, 0))
    changed = gguf_file(spec, tmp_path / "model", "auto")

    assert first == again != changed
    assert [file.name for file in (tmp_path / "model").glob("*.gguf")] == []
