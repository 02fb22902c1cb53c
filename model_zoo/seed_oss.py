"""Seed-OSS: Llama whose output projection has its bias apart from those of q, k and v."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes

DEFAULTS = {"head_dim": 128, "attention_bias": True, "num_key_value_heads": 8}


def seed_oss(config: Config, sizes: Sizes) -> Family:
    """Read what Seed-OSS adds."""
    pieces = config.integer("pretraining_tp", 1)
    config.require(pieces == 1, "pretraining_tp", "be 1", pieces)
    return Family(
        windows=(None,) * sizes.num_layers,
        qkv_bias=config.flag("attention_bias", True),
        o_bias=config.flag("attention_out_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
    )
