"""Qwen2 and Qwen3, dense and of experts: windows, q, k and v biases or q and k norms."""

from __future__ import annotations

from typing import Any

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import MAX_WIDTH, Family, Sizes, layer_kinds, read_experts
from mnemosyne.model_zoo.router import Router


def qwen2(config: Config, sizes: Sizes) -> Family:
    """Read Qwen2 and Qwen2.5: q, k and v always carry a bias."""
    return Family(windows=_windows(config, sizes), qkv_bias=True)


def qwen3(config: Config, sizes: Sizes) -> Family:
    """Read Qwen3: RMSNorm over each head's q and k, head_dim apart from the width."""
    bias = config.flag("attention_bias", False)
    return Family(windows=_windows(config, sizes), qkv_bias=bias, o_bias=bias, qk_norm=True)


def qwen3_moe(config: Config, sizes: Sizes) -> Family:
    """Read Qwen3 with experts."""
    bias = config.flag("attention_bias", False)
    family = Family(windows=_no_windows(config, sizes), qkv_bias=bias, o_bias=bias, qk_norm=True)
    return family._replace(**_experts(config, sizes))


def qwen2_moe(config: Config, sizes: Sizes) -> Family:
    """Read Qwen2 with experts, and with an MLP that every row is given to, behind a gate."""
    shared_width = config.integer("shared_expert_intermediate_size", most=MAX_WIDTH)
    family = Family(
        windows=_no_windows(config, sizes),
        qkv_bias=config.flag("qkv_bias", True),
        shared_width=shared_width,
        gates_shared=True,
    )
    return family._replace(**_experts(config, sizes))


def _no_windows(config: Config, sizes: Sizes) -> tuple[None, ...]:
    """Full attention in every layer: no published model of experts has windows.

    Raises:
        ValueError: for one that has.
    """
    used = config.flag("use_sliding_window", False)
    config.require(not used, "use_sliding_window", "be false", used)
    for unused in ("sliding_window", "max_window_layers"):
        config.value(unused)
    full = "full_attention"
    layer_kinds(config, sizes, lambda index: full, (full,))
    return (None,) * sizes.num_layers


def _experts(config: Config, sizes: Sizes) -> dict[str, Any]:
    """The experts of both: which layers have them, how many, and how they are weighed."""
    step = config.integer("decoder_sparse_step", 1)
    dense = config.value("mlp_only_layers") or []
    config.require(
        isinstance(dense, list) and all(index in range(sizes.num_layers) for index in dense),
        "mlp_only_layers",
        f"hold indices of the {sizes.num_layers} layers",
        dense,
    )
    return {
        **read_experts(config),
        "mlp_width": config.integer("moe_intermediate_size", most=MAX_WIDTH),
        "dense_mlp_width": config.integer("intermediate_size", most=MAX_WIDTH),
        "dense_layers": tuple(
            index for index in range(sizes.num_layers) if index in dense or (index + 1) % step
        ),
        "router": Router(normed=config.flag("norm_topk_prob", False)),
    }


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
