"""llama.cpp by its C interface: flash attention, an f16 cache, the weights of the checkpoint."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np


class LlamaCpp:
    """One request at a time (see the package)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(settings["gguf"].encode(), parameters)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {settings['gguf']}")
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = settings["max_length"]
        context.n_batch = settings["chunk"]
        context.n_threads = context.n_threads_batch = settings["threads"]
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._num_vocab = settings["vocab_size"]
        self._chunk = settings["chunk"]
        self._waiting: list[int] = []  # ids not yet computed
        version = f"llama-cpp-python {llama_cpp.__version__}"
        self.about = {"version": version, "fills": False, "batches": False}

    def add(self, index: int, request: dict[str, Any]) -> None:
        assert index == 0, "one request at a time"
        self._waiting = request["ids"]

    def step(self) -> list[tuple[int, int]]:
        chunk, self._waiting = self._waiting[: self._chunk], self._waiting[self._chunk :]
        ids = (llama_cpp.llama_token * len(chunk))(*chunk)
        batch = llama_cpp.llama_batch_get_one(ids, len(chunk))
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        if self._waiting:
            return []
        logits = llama_cpp.llama_get_logits_ith(self._context, -1)
        token_id = int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._num_vocab,))))
        self._waiting = [token_id]
        return [(0, token_id)]

    def stop(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), ctypes.c_bool(True))


def open_engine(settings: dict[str, Any]) -> LlamaCpp:
    """See the package."""
    return LlamaCpp(settings)
