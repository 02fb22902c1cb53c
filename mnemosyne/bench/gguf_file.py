"""A checkpoint as a GGUF file for llama.cpp: with its own values, or refused by name.

Bench prompts are token ids, so the file holds no tokenizer.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemosyne.files import shown
from mnemosyne.kept import kept_folder
from mnemosyne.machine import cache_folder
from mnemosyne.model_zoo.rope import RopeSpec, inverse_frequencies
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.model_zoo.tensors import tensor_shapes
from mnemosyne.runtime.headers import open_weights, read_headers

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
MODULES = {  # names in the checkpoint to names in a GGUF file
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
DTYPES = ("float32", "float16", "bfloat16")


def gguf_file(spec: ModelSpec, path: Path, dtype: str) -> Path:
    """The GGUF file of a checkpoint, in the user's cache folder; written if it is not there.

    Args:
        spec: what the checkpoint is.
        path: its folder.
        dtype: of the matrices, by its torch name; "auto" is that of the checkpoint.

    Raises:
        ValueError: if llama.cpp has no such model, or the package gguf is missing.
    """
    chosen = spec.dtype if dtype == "auto" else dtype
    check_carried(spec, chosen)
    if find_spec("gguf") is None:
        raise ValueError(
            "gguf must be installed to write a model for llama.cpp, got no such package; "
            "pip install gguf"
        )
    files = {header.file for header in read_headers(path).values()}
    stats = sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    source = inspect.getsource(sys.modules[__name__])
    recipe = hashlib.sha256(f"{spec} {chosen} {stats} {source}".encode()).hexdigest()
    write = partial(_write_folder, spec=spec, path=path, dtype=chosen)
    return kept_folder(cache_folder() / f"gguf-{recipe[:16]}", recipe, write) / "model.gguf"


def check_carried(spec: ModelSpec, dtype: str) -> None:
    """Refuse what a GGUF file, or llama.cpp, does not have.

    Raises:
        ValueError: naming it.
    """
    rope = spec.rope
    is_llama = ARCHITECTURES.get(spec.family) == "llama"
    for name, holds, value in (
        ("family", spec.family in ARCHITECTURES and not spec.is_text_half, spec.family),
        ("activation", spec.activation == "silu", spec.activation),
        ("dtype", dtype in DTYPES, dtype),
        ("windows", not any(spec.windows), next(filter(None, spec.windows), None)),
        ("o_bias", is_llama or not spec.o_bias, spec.o_bias),
        ("qkv_bias", spec.family != "qwen3" or not spec.qkv_bias, spec.qkv_bias),
        ("rope.kind", is_llama or rope.kind != "llama3", rope.kind),
        ("rope.truncate", rope.truncate, rope.truncate),
        ("rope.attention_factor", _is_usual_gain(rope), rope.attention_factor),
    ):
        if not holds:
            raise ValueError(
                f"{name} must be one that llama.cpp has for {spec.family}, got {shown(value)}; "
                "leave llamacpp out"
            )


def write_gguf(spec: ModelSpec, path: Path, dtype: str, file: Path) -> None:
    """Write the GGUF file of a checkpoint that ``check_carried`` lets pass.

    Args:
        spec: what the checkpoint is.
        path: its folder.
        dtype: of the matrices, by its torch name; vectors are float32.
        file: to write.
    """
    import gguf

    # Tensors wait for the header in a file: a model may be larger than the memory.
    writer = gguf.GGUFWriter(file, ARCHITECTURES[spec.family], use_temp_file=True)
    kinds = {
        "float32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
        "float16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
        "bfloat16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    }
    file_type, kind = kinds[dtype]
    writer.add_file_type(file_type)
    _write_spec(writer, spec)
    if spec.rope.kind == "llama3":
        plain = inverse_frequencies(replace(spec.rope, kind="default"))
        factors = (plain / inverse_frequencies(spec.rope)).float().numpy()
        writer.add_tensor("rope_freqs.weight", factors)
    headers = read_headers(path)
    for name in tensor_shapes(spec):
        with open_weights(headers[name].file) as tensors:
            weight = _ordered(tensors.get_tensor(name), name, spec)
        if weight.ndim == 1:
            writer.add_tensor(_name(name), weight.float().numpy())
        else:
            raw = weight.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(_name(name), raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_folder(folder: Path, *, spec: ModelSpec, path: Path, dtype: str) -> None:
    folder.mkdir(parents=True)
    write_gguf(spec, path, dtype, folder / "model.gguf")


def _write_spec(writer: Any, spec: ModelSpec) -> None:
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.width)
    writer.add_block_count(spec.num_layers)
    writer.add_feed_forward_length(spec.mlp_width)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    _write_rope(writer, spec.rope)


def _write_rope(writer: Any, rope: RopeSpec) -> None:
    import gguf

    writer.add_rope_freq_base(rope.theta)
    if rope.kind not in ("linear", "yarn"):
        return  # llama3 is a tensor of factors
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope.kind))
    writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_positions)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _is_usual_gain(rope: RopeSpec) -> bool:
    """Return whether cos and sin are multiplied by what llama.cpp makes of the factor."""
    gain = 0.1 * np.log(max(rope.factor, 1.0)) + 1.0 if rope.kind == "yarn" else 1.0
    return abs(rope.attention_factor - gain) < 1e-6


def _name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{kind}"
    _, _, layer, module = module.split(".", 3)
    return f"blk.{layer}.{MODULES[module]}.{kind}"


def _ordered(weight: Tensor, name: str, spec: ModelSpec) -> Tensor:
    """Rows of q and k in the order of llama.cpp's rotary pairs.

    Its llama turns neighbours, (0, 1), where the checkpoint has (0, D/2); its qwen has halves.
    """
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}
    num_heads = heads.get(name.rpartition(".")[0].rpartition(".")[2])
    if num_heads is None or ARCHITECTURES[spec.family] != "llama":
        return weight
    halves = weight.unflatten(0, (num_heads, 2, spec.head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)
