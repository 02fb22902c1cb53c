"""gpt-oss: experts with biases and a clamped gate, sinks, a window in every other layer."""

from __future__ import annotations

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Family, Sizes, layer_kinds, read_experts
from mnemosyne.model_zoo.rope_entries import KINDS
from mnemosyne.model_zoo.router import Router
from mnemosyne.operators import CLAMP, SWISH

DEFAULTS = {
    "head_dim": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "sliding_window": 128,
    "attention_bias": True,
}
NAMES = (("mlp.router", "mlp.router"),)


def gpt_oss(config: Config, sizes: Sizes) -> Family:
    """Read what gpt-oss adds.

    Raises:
        ValueError: for another gate than the published ones have, or another quantisation.
    """
    full, sliding = KINDS
    kinds = layer_kinds(config, sizes, lambda index: full if index % 2 else sliding, KINDS)
    window = config.integer("sliding_window")
    for name, known in (("swiglu_limit", CLAMP), ("swiglu_alpha", SWISH)):
        given = config.number(name, known)
        config.require(given == known, name, f"be {known}", given)
    experts = read_experts(config)
    per_token = config.integer("experts_per_token", experts["experts_per_token"])
    config.require(
        per_token == experts["experts_per_token"],
        "experts_per_token",
        "agree with num_experts_per_tok",
        per_token,
    )
    config.value("initial_context_length")  # the rotation has its own
    bias = config.flag("attention_bias", True)
    family = Family(
        windows=tuple(window if kind == sliding else None for kind in kinds),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        has_sinks=True,
        activation="clamped",
        router=Router(scores="softmax of chosen", is_biased=True),
        names=NAMES,
        expert_storage=_storage(config),
    )
    config.value("hidden_act")  # the gate is clamped, whatever the entry says
    return family._replace(**experts)


def _storage(config: Config) -> str:
    """How the files hold the experts."""
    packing = config.section("quantization_config")
    if packing is None:
        return "in turns"
    method = packing.value("quant_method")
    packing.require(method == "mxfp4", "quant_method", "be mxfp4", method)
    packing.value("modules_to_not_convert")  # all but the experts, in every file
    packing.refuse_rest()
    return "mxfp4"
