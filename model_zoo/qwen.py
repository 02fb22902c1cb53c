"""Qwen2, Qwen2.5 and Qwen3: windows by layer, q, k and v biases or q and k norms."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config, Family, num_layers


def qwen2(config: Config) -> Family:
    """Read Qwen2 and Qwen2.5: q, k and v always carry a bias."""
    return Family(windows=_windows(config), qkv_bias=True)


def qwen3(config: Config) -> Family:
    """Read Qwen3: RMSNorm over each head's q and k, head_dim apart from the width."""
    bias = config.flag("attention_bias", False)
    return Family(windows=_windows(config), qkv_bias=bias, o_bias=bias, qk_norm=True, head_dim=128)


def _windows(config: Config) -> tuple[int | None, ...]:
    """The window of each layer, from ``layer_types`` or else ``max_window_layers``.

    Raises:
        ValueError: for an unknown kind of layer, or sliding layers without a window.
    """
    count = num_layers(config)
    used = config.flag("use_sliding_window", False)
    width = config.integer("sliding_window", 4096)
    if config.value("sliding_window", absent=width) is None:
        used = False
    num_full = config.integer("max_window_layers", 28, least=0)
    kinds = config.value("layer_types")
    if kinds is None:
        return tuple(width if used and i >= num_full else None for i in range(count))
    config.require(
        isinstance(kinds, list) and len(kinds) == count,
        "layer_types",
        f"name the kind of each of {count} layers",
        kinds,
    )
    for kind in kinds:
        known = kind == "full_attention" or (kind == "sliding_attention" and used)
        rule = "hold full_attention, or sliding_attention where use_sliding_window is true"
        config.require(known, "layer_types", rule, kind)
    return tuple(width if kind == "sliding_attention" else None for kind in kinds)
