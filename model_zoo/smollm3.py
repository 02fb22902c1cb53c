"""SmolLM3: Llama of which every fourth layer knows no positions."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, layer_kinds, turning_layers
from mnemosyne.model_zoo.rope_entries import read_rope

DEFAULTS = {"rope_theta": 2_000_000.0, "tie_word_embeddings": True, "num_key_value_heads": 4}


def smollm3(config: Config, sizes: Sizes) -> Family:
    """Read what SmolLM3 adds.

    Raises:
        ValueError: for a list of layers of another length, or sliding layers without a window.
    """
    # Written in the published files, and read by nothing.
    config.value("pretraining_tp")
    config.value("max_window_layers")
    turning = turning_layers(config, sizes)
    window = None
    if config.flag("use_sliding_window", False) and config.value("sliding_window") is not None:
        window = config.integer("sliding_window")
    full, sliding = "full_attention", "sliding_attention"
    kinds = layer_kinds(
        config,
        sizes,
        lambda index: full if window is None or turning[index] else sliding,
        (full, sliding),
    )
    rope = read_rope(config, sizes.head_dim, sizes.max_positions)
    bias = config.flag("attention_bias", False)
    return Family(
        windows=tuple(window if kind == sliding else None for kind in kinds),
        rope=rope,
        ropes=tuple(rope if turns else None for turns in turning),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
