"""Mixtral: Mistral with experts, whose weights sum to one."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, read_experts
from mnemosyne.model_zoo.router import Router

DEFAULTS = {"rope_theta": 1_000_000.0, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
NAMES = (
    ("mlp.router", "block_sparse_moe.gate"),
    ("mlp.router.correction", "block_sparse_moe.e_score_correction_bias"),
    ("mlp.experts.gate", "block_sparse_moe.experts.{}.w1"),
    ("mlp.experts.up", "block_sparse_moe.experts.{}.w3"),
    ("mlp.experts.down", "block_sparse_moe.experts.{}.w2"),
)


def mixtral(config: Config, sizes: Sizes) -> Family:
    """Read what Mixtral adds to Mistral."""
    window = config.value("sliding_window")
    if window is not None:
        window = config.integer("sliding_window")
    return Family(
        windows=(window,) * sizes.num_layers,
        **read_experts(config),
        router=Router(normed=True),
        names=NAMES,
    )
