"""Olmo 3: norms after attention and MLP, and over whole rows of q and k; windows by layer."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, layer_kinds
from mnemosyne.model_zoo.rope_entries import KINDS, read_ropes_by_kind

DEFAULTS = {"rope_theta": 500_000.0, "sliding_window": 4096, "rms_norm_eps": 1e-5}


def olmo3(config: Config, sizes: Sizes) -> Family:
    """Read what Olmo 3 adds; a stretched rotation is that of full layers alone."""
    full, sliding = KINDS
    kinds = layer_kinds(
        config, sizes, lambda index: full if (index + 1) % 4 == 0 else sliding, KINDS
    )
    window = config.integer("sliding_window")
    theta = config.number("rope_theta")
    ropes = read_ropes_by_kind(config, sizes.head_dim, sizes.max_positions, sliding_theta=theta)
    bias = config.flag("attention_bias", False)
    return Family(
        windows=tuple(window if kind == sliding else None for kind in kinds),
        rope=ropes[full],
        ropes=tuple(ropes[kind] for kind in kinds),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        qk_norm_over="row",
        norms="after",
    )
