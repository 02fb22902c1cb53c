"""All families, by what config.json calls their architecture."""

from __future__ import annotations

from mnemosyne.model_zoo.family import Reader
from mnemosyne.model_zoo.llama import llama
from mnemosyne.model_zoo.mistral import mistral
from mnemosyne.model_zoo.qwen import qwen2, qwen3

FAMILIES = {
    "LlamaForCausalLM": Reader("llama", llama),
    "MistralForCausalLM": Reader("mistral", mistral),
    "Qwen2ForCausalLM": Reader("qwen2", qwen2),
    "Qwen3ForCausalLM": Reader("qwen3", qwen3, {"head_dim": 128}),
}
