"""Qwen2, Qwen2.5 and Qwen3: windows by layer, q, k and v biases or q and k norms."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, layer_kinds


def qwen2(config: Config, sizes: Sizes) -> Family:
    """Read Qwen2 and Qwen2.5: q, k and v always carry a bias."""
    return Family(windows=_windows(config, sizes), qkv_bias=True)


def qwen3(config: Config, sizes: Sizes) -> Family:
    """Read Qwen3: RMSNorm over each head's q and k, head_dim apart from the width."""
    bias = config.flag("attention_bias", False)
    return Family(windows=_windows(config, sizes), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _windows(config: Config, sizes: Sizes) -> tuple[int | None, ...]:
    """The window of each layer, from ``layer_types`` or else ``max_window_layers``.

    Raises:
        ValueError: for an unknown kind of layer, or sliding layers without a window.
    """
    used = config.flag("use_sliding_window", False)
    width = config.integer("sliding_window", 4096)
    if config.value("sliding_window", absent=width) is None:
        used = False
    num_full = config.integer("max_window_layers", 28, least=0)
    full, sliding = "full_attention", "sliding_attention"
    kinds = layer_kinds(
        config,
        sizes,
        lambda index: sliding if used and index >= num_full else full,
        (full, sliding) if used else (full,),
        "hold full_attention, or sliding_attention where use_sliding_window is true",
    )
    return tuple(width if kind == sliding else None for kind in kinds)
