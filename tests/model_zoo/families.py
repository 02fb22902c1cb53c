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
    if tiny.name in ("SmolLM3", "Olmo3"):  # they have no entry of that name
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
        for parameter_name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.3)
    model.config.dtype = torch.float64
    model.save_pretrained(path)
    return path
