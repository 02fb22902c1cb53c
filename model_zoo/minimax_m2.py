"""MiniMax M2: Mixtral's experts behind sigmoids, norms over whole rows, half of each head turns."""

from __future__ import annotations

from typing import Any

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import MAX_LAYERS, Family, Sizes, read_experts
from mnemosyne.model_zoo.mixtral import NAMES
from mnemosyne.model_zoo.rope_entries import read_rope
from mnemosyne.model_zoo.router import Router

DEFAULTS = {
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5_000_000.0,
}
# Switches that the family does not turn, as the published files have them.
FIXED: dict[str, Any] = {
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
    "shared_intermediate_size": 0,
}


def minimax_m2(config: Config, sizes: Sizes) -> Family:
    """Read what MiniMax M2 adds.

    Raises:
        ValueError: for a switch that no published model turns.
    """
    for name, known in FIXED.items():
        given = config.value(name, absent=known)
        config.require(given == known, name, f"be {known}", given)
    kinds = config.value("attn_type_list")
    config.require(
        not kinds or (isinstance(kinds, list) and set(kinds) == {1}),
        "attn_type_list",
        "hold 1, full attention, for each layer",
        kinds,
    )
    for unused in ("auto_map", "mlp_intermediate_size", "shared_moe_mode", "use_mtp"):
        config.value(unused)
    num_modules = config.integer("num_mtp_modules", 0, least=0, most=MAX_LAYERS)
    config.integer("mtp_transformer_layers", 1, least=0)
    family = Family(
        windows=(None,) * sizes.num_layers,
        rope=read_rope(config, sizes.head_dim, sizes.max_positions, partial=True),
        qk_norm=True,
        qk_norm_over="row",
        router=Router(scores="sigmoid", is_corrected=True, normed=True),
        names=NAMES,
        num_extra_layers=num_modules,
    )
    return family._replace(**read_experts(config))
