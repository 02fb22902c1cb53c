"""GLM-4.5, 4.6 and 4.7: half of each head turns; experts behind sigmoids, one for every row."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import MAX_LAYERS, MAX_WIDTH, Family, Sizes, read_experts
from mnemosyne.model_zoo.rope_entries import read_rope
from mnemosyne.model_zoo.router import Router

DEFAULTS = {
    "partial_rotary_factor": 0.5,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "norm_topk_prob": True,
}
NAMES = (
    ("mlp.shared.gate", "mlp.shared_experts.gate_proj"),
    ("mlp.shared.up", "mlp.shared_experts.up_proj"),
    ("mlp.shared.down", "mlp.shared_experts.down_proj"),
)


def glm4_moe(config: Config, sizes: Sizes) -> Family:
    """Read what GLM adds.

    Raises:
        ValueError: for groups that do not divide the experts, or too few of them.
    """
    experts = read_experts(config)
    num_groups, kept = config.integer("n_group", 1), config.integer("topk_group", 1)
    each, rest = divmod(experts["num_experts"], num_groups)
    config.require(not rest, "n_group", f"divide {experts['num_experts']} experts", num_groups)
    config.require(
        kept <= num_groups and kept * each >= experts["experts_per_token"] and each > 1,
        "topk_group",
        f"leave {experts['experts_per_token']} experts or more of {num_groups} groups",
        kept,
    )
    expert_width = config.integer("moe_intermediate_size", most=MAX_WIDTH)
    num_dense = config.integer("first_k_dense_replace", 1, least=0)
    family = Family(
        windows=(None,) * sizes.num_layers,
        rope=read_rope(config, sizes.head_dim, sizes.max_positions, partial=True),
        qkv_bias=config.flag("attention_bias", False),
        qk_norm=config.flag("use_qk_norm", False),
        mlp_width=expert_width,
        shared_width=expert_width * config.integer("n_shared_experts", 1),
        dense_layers=tuple(range(min(num_dense, sizes.num_layers))),
        dense_mlp_width=config.integer("intermediate_size", most=MAX_WIDTH),
        router=Router(
            scores="sigmoid",
            is_corrected=True,
            num_groups=num_groups,
            kept_groups=kept,
            normed=config.flag("norm_topk_prob", True),
            eps=1e-20,
            factor=config.number("routed_scaling_factor", 1.0),
        ),
        names=NAMES,
        num_extra_layers=_num_extra(config),
    )
    return family._replace(**experts)


def _num_extra(config: Config) -> int:
    """Layers after the last that only predict further tokens, under either name."""
    named = config.integer("num_nextn_predict_layers", 1, least=0, most=MAX_LAYERS)
    return config.integer("num_mtp_layers", named, least=0, most=MAX_LAYERS)
