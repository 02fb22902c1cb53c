"""Hugging Face transformers: sdpa attention, a DynamicCache, prompts fed in chunks."""

from __future__ import annotations

from typing import Any

import torch
import transformers


class Transformers:
    """One request at a time (see the package)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        transformers.logging.set_verbosity_error()
        dtype = (
            settings["dtype"] if settings["dtype"] == "auto" else getattr(torch, settings["dtype"])
        )
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings["model"], dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._chunk = settings["chunk"]
        self._waiting: list[int] = []  # ids not yet computed
        self._cache: Any = None
        version = f"transformers {transformers.__version__}"
        self.about = {"version": version, "fills": True, "batches": False}

    def add(self, index: int, request: dict[str, Any]) -> None:
        assert index == 0, "one request at a time"
        self._cache = transformers.DynamicCache(config=self._model.config)
        self._waiting = request["ids"]
        if request["is_filled"]:
            self._fill(len(self._waiting) - 1)
            self._waiting = self._waiting[-1:]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        chunk, self._waiting = self._waiting[: self._chunk], self._waiting[self._chunk :]
        ids = torch.tensor([chunk])
        # by place: its keyword is past_key_values before transformers 5.24, and cache from there on
        out = self._model(ids, None, None, self._cache, use_cache=True, logits_to_keep=1)
        if self._waiting:
            return []
        token_id = int(out.logits[0, -1].argmax())
        self._waiting = [token_id]
        return [(0, token_id)]

    def stop(self) -> None:
        self._cache = None

    def _fill(self, num_tokens: int) -> None:
        config = self._model.config
        head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        shape = (1, config.num_key_value_heads, num_tokens, head_dim)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape).to(self._model.dtype) for _ in range(2))
            self._cache.update(k, v, layer)


def open_engine(settings: dict[str, Any]) -> Transformers:
    """See the package."""
    return Transformers(settings)
