"""Llama 4: three chunked layers to one that sees all and turns nothing; experts, one per row."""

from __future__ import annotations

from dataclasses import replace

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import (
    MAX_WIDTH,
    Family,
    Sizes,
    Temperature,
    layer_kinds,
    read_experts,
    turning_layers,
)
from mnemosyne.model_zoo.rope_entries import read_rope
from mnemosyne.model_zoo.router import Router

DEFAULTS = {
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "attention_chunk_size": 8192,
}
NAMES = (
    ("mlp.gate", "feed_forward.gate_proj"),
    ("mlp.up", "feed_forward.up_proj"),
    ("mlp.down", "feed_forward.down_proj"),
    ("mlp.router", "feed_forward.router"),
    ("mlp.experts", "feed_forward.experts"),
    ("mlp.shared.gate", "feed_forward.shared_expert.gate_proj"),
    ("mlp.shared.up", "feed_forward.shared_expert.up_proj"),
    ("mlp.shared.down", "feed_forward.shared_expert.down_proj"),
)


def llama4(config: Config, sizes: Sizes) -> Family:
    """Read what Llama 4 adds."""
    config.value("for_llm_compressor")  # says how the file was made
    turning = turning_layers(config, sizes)
    full, chunked = "full_attention", "chunked_attention"
    size = config.value("attention_chunk_size")
    if size is not None:
        size = config.integer("attention_chunk_size")
    kinds = layer_kinds(
        config,
        sizes,
        lambda index: chunked if turning[index] and size is not None else full,
        (full,) if size is None else (full, chunked),
    )
    rope = replace(read_rope(config, sizes.head_dim, sizes.max_positions), adjacent=True)
    bias = config.flag("attention_bias", False)
    width = config.integer("intermediate_size", most=MAX_WIDTH)
    family = Family(
        windows=tuple(size if kind == chunked else None for kind in kinds),
        chunked=True,
        rope=rope,
        ropes=tuple(rope if turns else None for turns in turning),
        temperature=_temperature(config),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=config.flag("use_qk_norm", True),
        qk_norm_over="head, unweighted",
        mlp_width=width,
        shared_width=width,
        dense_mlp_width=config.integer("intermediate_size_mlp", 16_384, most=MAX_WIDTH),
        dense_layers=_dense_layers(config, sizes),
        router=Router(scores="sigmoid", on_input=True),
        names=NAMES,
        expert_storage="halves",
    )
    return family._replace(**read_experts(config))


def _temperature(config: Config) -> Temperature | None:
    """The temperature of layers that turn nothing, which sharpens their scores far out."""
    gain, span = config.number("attn_scale", 0.1), config.integer("floor_scale", 8192)
    tuned = config.value("attn_temperature_tuning", absent=True)
    config.require(
        isinstance(tuned, int), "attn_temperature_tuning", "be true or false", tuned
    )  # early files have a number
    return Temperature(gain, span, shift=1, only_unturned=True) if tuned else None


def _dense_layers(config: Config, sizes: Sizes) -> tuple[int, ...]:
    """The layers without experts, from ``moe_layers`` or else ``interleave_moe_layer_step``."""
    step = config.integer("interleave_moe_layer_step", 1)
    sparse = config.value("moe_layers")
    if sparse is None:
        sparse = list(range(step - 1, sizes.num_layers, step))
    config.require(
        isinstance(sparse, list) and all(index in range(sizes.num_layers) for index in sparse),
        "moe_layers",
        f"hold indices of the {sizes.num_layers} layers",
        sparse,
    )
    return tuple(index for index in range(sizes.num_layers) if index not in sparse)
