"""Tiny random checkpoints of every family beyond the first four, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from tests.model_zoo.tiny import MAX_POSITIONS, VOCAB_SIZE

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}


class Tiny(NamedTuple):
    """A family: its class in transformers, and what its tiny configs say beyond ``SIZES``."""

    name: str
    fields: dict[str, Any]
    whole: str | None = None  # the multimodal architecture that it is to be half of


BY_KIND = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
MINISTRAL = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.4}
GEMMA: dict[str, Any] = {
    "sliding_window": 24,
    "query_pre_attn_scalar": 20,
    "rope_parameters": BY_KIND,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Of each switch that a family has, both sides.
FAMILIES: dict[str, Tiny] = {
    "seed_oss": Tiny("SeedOss", {"attention_out_bias": False}),
    "seed_oss-biased": Tiny("SeedOss", {"attention_out_bias": True, "mlp_bias": True}),
    "smollm3": Tiny("SmolLM3", {"head_dim": 8, "rope_parameters": YARN}),
    "smollm3-windows": Tiny(
        "SmolLM3",
        {
            "head_dim": 8,
            "no_rope_layers": [0, 1, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 24,
            "tie_word_embeddings": False,
            "attention_bias": True,
        },
    ),
    "olmo3": Tiny("Olmo3", {"sliding_window": 24}),
    "olmo3-yarn": Tiny(
        "Olmo3",
        {
            "sliding_window": 24,
            "attention_bias": True,
            "rope_parameters": BY_KIND | {"full_attention": YARN},
        },
    ),
    "gemma3": Tiny("Gemma3Text", GEMMA),
    "gemma3-capped": Tiny(
        "Gemma3Text", GEMMA | {"final_logit_softcapping": 3.0, "attention_bias": True}
    ),
    "gemma3-half": Tiny("Gemma3Text", GEMMA, whole="Gemma3"),
    "ministral3": Tiny("Ministral3", {"rope_parameters": MINISTRAL}),
    "ministral3-half": Tiny(
        "Ministral3", {"rope_parameters": MINISTRAL, "sliding_window": 24}, whole="Mistral3"
    ),
    "mistral3-half": Tiny("Mistral", {"sliding_window": None}, whole="Mistral3"),
}
EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
FAMILIES |= {
    "qwen3_moe": Tiny("Qwen3Moe", EXPERTS),
    "qwen3_moe-between": Tiny(
        "Qwen3Moe", EXPERTS | {"norm_topk_prob": False, "decoder_sparse_step": 2}
    ),
    "qwen2_moe": Tiny(
        "Qwen2Moe",
        EXPERTS
        | {
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 32,
        },
    ),
    "mixtral": Tiny("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral-window": Tiny(
        "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 24}
    ),
}
GLM: dict[str, Any] = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 1,
}
LLAMA_4: dict[str, Any] = {
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 32,
    "floor_scale": 16,
    "attn_scale": 0.4,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 128,
    },
}
FAMILIES |= {
    "gpt_oss": Tiny(
        "GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 24}
    ),
    "glm4_moe": Tiny("Glm4Moe", GLM | {"attention_bias": True, "use_qk_norm": True}),
    "glm4_moe-groups": Tiny("Glm4Moe", GLM | {"n_group": 4, "topk_group": 2}),
    "minimax_m2": Tiny("MiniMaxM2", {"num_local_experts": 6, "num_experts_per_tok": 2}),
    "minimax_m2-partial": Tiny(
        "MiniMaxM2", {"num_local_experts": 5, "num_experts_per_tok": 3, "rotary_dim": 8}
    ),
    "llama4": Tiny("Llama4Text", LLAMA_4),
    "llama4-between": Tiny(
        "Llama4Text",
        LLAMA_4
        | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "no_rope_layers": [1, 0, 1, 1]},
    ),
    "llama4-half": Tiny("Llama4Text", LLAMA_4, whole="Llama4"),
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tiny_family(path: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint in float64, with weights so large that greedy tokens vary.

    Args:
        path: directory to write.
        name: one of ``FAMILIES``.
        seed: of the weights.
        changes: of the config.

    Returns:
        ``path``.
    """
    tiny = FAMILIES[name]
    fields = SIZES | tiny.fields | changes
    if tiny.name in ("SmolLM3", "Olmo3", "Qwen2Moe"):  # they have no entry of that name
        del fields["head_dim"]
    config = getattr(transformers, f"{tiny.name}Config")(**fields)
    model_class = f"{tiny.name.removesuffix('Text')}ForCausalLM"
    if tiny.whole is not None:
        config = getattr(transformers, f"{tiny.whole}Config")(
            text_config=config,
            vision_config=VISION,
            tie_word_embeddings=config.tie_word_embeddings,
        )
        model_class = f"{tiny.whole}ForConditionalGeneration"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config).double()
        correction = [entry for entry in model.named_buffers() if "correction" in entry[0]]
        for parameter_name, parameter in (*model.named_parameters(), *correction):
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    model.config.dtype = torch.float64
    model.save_pretrained(path)
    return path
