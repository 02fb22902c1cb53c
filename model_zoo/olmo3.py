"""Olmo 3: norms after attention and MLP, and over whole rows of q and k; windows by layer."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes
from mnemosyne.model_zoo.rope_entries import full_and_sliding

DEFAULTS = {"rope_theta": 500_000.0, "sliding_window": 4096, "rms_norm_eps": 1e-5}


def olmo3(config: Config, sizes: Sizes) -> Family:
    """Read what Olmo 3 adds; a stretched rotation is that of full layers alone."""
    theta = config.number("rope_theta")
    bias = config.flag("attention_bias", False)
    return Family(
        **full_and_sliding(config, sizes, every=4, sliding_theta=theta),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        qk_norm_over="row",
        norms="after",
    )
