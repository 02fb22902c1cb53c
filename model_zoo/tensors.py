"""Names and shapes of a checkpoint's tensors, from the spec alone: no module is built."""

from __future__ import annotations

from collections.abc import Iterator

from mnemosyne.model_zoo.spec import ModelSpec

Shape = tuple[int, ...]

# Entries of config.json that a tensor's sizes come from, by the last part of its module.
ENTRIES = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads x head_dim, hidden_size",
    "k_proj": "num_key_value_heads x head_dim, hidden_size",
    "v_proj": "num_key_value_heads x head_dim, hidden_size",
    "o_proj": "hidden_size, num_attention_heads x head_dim",
    "gate_proj": "intermediate_size, hidden_size",
    "up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size",
}


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every tensor of the whole model, by its Hugging Face name."""
    table = spec.vocab_size, spec.width
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": table}
    layer = dict(_layer(spec))
    for index in range(spec.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (spec.width,)
    return shapes if spec.tied else shapes | {"lm_head.weight": table}


def entries_of(name: str) -> str:
    """What config.json calls the sizes of a tensor."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return ENTRIES.get(module, "head_dim" if module in ("q_norm", "k_norm") else "hidden_size")


def _layer(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    width, mlp_width = spec.width, spec.mlp_width
    for module, rows, columns, bias in (
        ("self_attn.q_proj", q_width, width, spec.qkv_bias),
        ("self_attn.k_proj", kv_width, width, spec.qkv_bias),
        ("self_attn.v_proj", kv_width, width, spec.qkv_bias),
        ("self_attn.o_proj", width, q_width, spec.o_bias),
        ("mlp.gate_proj", mlp_width, width, spec.mlp_bias),
        ("mlp.up_proj", mlp_width, width, spec.mlp_bias),
        ("mlp.down_proj", width, mlp_width, spec.mlp_bias),
    ):
        yield f"{module}.weight", (rows, columns)
        if bias:
            yield f"{module}.bias", (rows,)
    yield "input_layernorm.weight", (width,)
    yield "post_attention_layernorm.weight", (width,)
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (spec.head_dim,)
        yield "self_attn.k_norm.weight", (spec.head_dim,)
