"""All families, by what config.json calls their architecture."""

from __future__ import annotations

from mnemosyne.model_zoo import gemma3, olmo3, seed_oss, smollm3
from mnemosyne.model_zoo.family import Reader
from mnemosyne.model_zoo.llama import llama
from mnemosyne.model_zoo.mistral import MINISTRAL_DEFAULTS, ministral3, mistral
from mnemosyne.model_zoo.qwen import qwen2, qwen3

FAMILIES = {
    "Gemma3ForCausalLM": Reader("gemma3_text", gemma3.gemma3, gemma3.DEFAULTS),
    "LlamaForCausalLM": Reader("llama", llama),
    "Ministral3ForCausalLM": Reader("ministral3", ministral3, MINISTRAL_DEFAULTS),
    "MistralForCausalLM": Reader("mistral", mistral),
    "Olmo3ForCausalLM": Reader("olmo3", olmo3.olmo3, olmo3.DEFAULTS),
    "Qwen2ForCausalLM": Reader("qwen2", qwen2),
    "Qwen3ForCausalLM": Reader("qwen3", qwen3, {"head_dim": 128}),
    "SeedOssForCausalLM": Reader("seed_oss", seed_oss.seed_oss, seed_oss.DEFAULTS),
    "SmolLM3ForCausalLM": Reader("smollm3", smollm3.smollm3, smollm3.DEFAULTS),
}
