"""Gemma 3: five sliding layers to a full one, each kind with its own rotation; norms all around."""

from __future__ import annotations

from math import sqrt

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, read_activation
from mnemosyne.model_zoo.rope_entries import full_and_sliding

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}


def gemma3(config: Config, sizes: Sizes) -> Family:
    """Read what Gemma 3 adds.

    Raises:
        ValueError: for what no published model of the family uses.
    """
    every = config.integer("_sliding_window_pattern", 6)  # as newer files call it
    every = config.integer("sliding_window_pattern", every)
    theta = config.number("rope_local_base_freq")
    bias = config.flag("attention_bias", False)
    capped = config.value("final_logit_softcapping")
    return Family(
        **full_and_sliding(config, sizes, every=every, sliding_theta=theta),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        norms="around",
        norm_offset=1.0,
        score_scale=config.number("query_pre_attn_scalar") ** -0.5,
        activation=read_activation(config, "hidden_activation"),
        embed_scale=sqrt(sizes.width),
        logit_cap=None if capped is None else config.number("final_logit_softcapping"),
    )
