"""Mistral: Llama with one window for all layers; Ministral 3: sharper scores far out."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, Temperature
from mnemosyne.model_zoo.rope_entries import read_rope

MINISTRAL_DEFAULTS = {
    "vocab_size": 131_072,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262_144,
}


def mistral(config: Config, sizes: Sizes) -> Family:
    """Read what Mistral adds: ``sliding_window``, null where every layer sees everything."""
    window = config.value("sliding_window", absent=4096)
    if window is not None:
        window = config.integer("sliding_window", 4096)
    return Family(windows=(window,) * sizes.num_layers)


def ministral3(config: Config, sizes: Sizes) -> Family:
    """Read what Ministral 3 adds: queries are multiplied by a factor that grows with position.

    Raises:
        ValueError: if its rotation or that factor is not described.
    """
    window = config.value("sliding_window")
    if window is not None:
        window = config.integer("sliding_window")
    rope = config.section("rope_parameters")
    if rope is None:
        config.refuse("rope_parameters", "describe the rotation", None)
    temperature = None
    if rope.value("llama_4_scaling_beta") != 0:  # as Devstral 2 has it
        temperature = Temperature(
            gain=rope.number("llama_4_scaling_beta"),
            span=rope.integer("original_max_position_embeddings"),
        )
    # Its other length is a copy of the config's own, which nothing reads.
    own = frozenset({"llama_4_scaling_beta", "max_position_embeddings"})
    return Family(
        windows=(window,) * sizes.num_layers,
        rope=read_rope(config, sizes.head_dim, sizes.max_positions, elsewhere=own),
        temperature=temperature,
    )
