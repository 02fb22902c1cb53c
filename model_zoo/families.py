"""All families, by what config.json calls their architecture."""

from __future__ import annotations

from mnemosyne.model_zoo import (
    gemma3,
    glm4_moe,
    gpt_oss,
    llama4,
    minimax_m2,
    mixtral,
    olmo3,
    seed_oss,
    smollm3,
)
from mnemosyne.model_zoo.family import Reader
from mnemosyne.model_zoo.llama import llama
from mnemosyne.model_zoo.mistral import MINISTRAL_DEFAULTS, ministral3, mistral
from mnemosyne.model_zoo.qwen import qwen2, qwen2_moe, qwen3, qwen3_moe

FAMILIES = {
    "Gemma3ForCausalLM": Reader("gemma3_text", gemma3.gemma3, gemma3.DEFAULTS),
    "Glm4MoeForCausalLM": Reader("glm4_moe", glm4_moe.glm4_moe, glm4_moe.DEFAULTS),
    "GptOssForCausalLM": Reader("gpt_oss", gpt_oss.gpt_oss, gpt_oss.DEFAULTS, "bfloat16"),
    "Llama4ForCausalLM": Reader("llama4_text", llama4.llama4, llama4.DEFAULTS),
    "LlamaForCausalLM": Reader("llama", llama),
    "MiniMaxM2ForCausalLM": Reader("minimax_m2", minimax_m2.minimax_m2, minimax_m2.DEFAULTS),
    "Ministral3ForCausalLM": Reader("ministral3", ministral3, MINISTRAL_DEFAULTS),
    "MistralForCausalLM": Reader("mistral", mistral),
    "MixtralForCausalLM": Reader("mixtral", mixtral.mixtral, mixtral.DEFAULTS),
    "Olmo3ForCausalLM": Reader("olmo3", olmo3.olmo3, olmo3.DEFAULTS),
    "Qwen2ForCausalLM": Reader("qwen2", qwen2),
    "Qwen3ForCausalLM": Reader("qwen3", qwen3, {"head_dim": 128}),
    "Qwen2MoeForCausalLM": Reader("qwen2_moe", qwen2_moe),
    "Qwen3MoeForCausalLM": Reader("qwen3_moe", qwen3_moe),
    "SeedOssForCausalLM": Reader("seed_oss", seed_oss.seed_oss, seed_oss.DEFAULTS),
    "SmolLM3ForCausalLM": Reader("smollm3", smollm3.smollm3, smollm3.DEFAULTS),
}
