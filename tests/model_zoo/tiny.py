"""Tiny random checkpoints that transformers writes, and its forward pass over them: the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

VOCAB_SIZE = 96
MAX_POSITIONS = 1024

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 128},
}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny_checkpoint(
    path: Path,
    *,
    family: str = "llama",
    rope: str = "default",
    rope_form: str = "new",
    tied: bool = False,
    bias: bool = False,
    head_dim: int | None = None,
    window: int | None = None,
    layer_types: list[str] | None = None,
    num_layers: int = 2,
    mlp_width: int = 48,
    shard_bytes: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a random checkpoint in float64, with weights so large that greedy tokens vary.

    Args:
        path: directory to write.
        family: one of ``FAMILIES``.
        rope: one of ``ROPES``.
        rope_form: "new" as transformers 5 writes it, "old" with ``rope_scaling.rope_type`` and
            ``rope_theta``, "oldest" with ``rope_scaling.type``.
        tied: the head is the embedding.
        bias: attention (and, for llama, MLP) biases; qwen2 has its own always.
        head_dim: explicit, where 8 = width / heads is not wanted.
        window: sliding window; of all layers for mistral, of layers from the second on for qwen.
        layer_types: qwen only, the kind of each layer.
        num_layers: layers.
        mlp_width: of the MLP.
        shard_bytes: cut the weights into files of at most this size.
        seed: of the weights.

    Returns:
        ``path``.
    """
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": rope, "rope_theta": 10_000.0, **ROPES[rope]},
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **_family_fields(family, bias, head_dim, window, layer_types),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(path, max_shard_size=shard_bytes or "1GB")
    if rope_form != "new":
        _rewrite_rope(path / "config.json", "rope_type" if rope_form == "old" else "type")
    return path


def oracle(path: Path, dtype: torch.dtype = torch.float64) -> transformers.PreTrainedModel:
    """The same checkpoint in transformers, attention written out."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def oracle_logits(path: Path, token_ids: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits [T, V] of every position of one prompt."""
    return oracle(path, dtype)(torch.tensor([token_ids]), use_cache=False).logits[0]


def _family_fields(
    family: str,
    bias: bool,
    head_dim: int | None,
    window: int | None,
    layer_types: list[str] | None,
) -> dict[str, Any]:
    fields: dict[str, Any] = {} if head_dim is None else {"head_dim": head_dim}
    if family == "llama":
        fields |= {"attention_bias": bias, "mlp_bias": bias}
    if family == "mistral":
        fields |= {"sliding_window": window}
    if family.startswith("qwen"):
        fields |= {"use_sliding_window": window is not None, "sliding_window": window}
        fields |= {"max_window_layers": 1, "layer_types": layer_types}
    if family == "qwen3":
        fields |= {"attention_bias": bias, "head_dim": head_dim or 8}
    return fields


def _rewrite_rope(file: Path, key: str) -> None:
    """Say the same as older releases did: rope_scaling, null for the default kind."""
    config = json.loads(file.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    file.write_text(json.dumps(config), encoding="utf-8")
