"""llama.cpp by its C interface: flash attention, an f16 cache, the weights of the checkpoint."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

MODULES = {  # names in the checkpoint to names in a GGUF file
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class LlamaCpp:
    """One request at a time (see the package)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        path = write_gguf(Path(settings["model"]))
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = settings["max_length"]
        context.n_batch = settings["chunk"]
        context.n_threads = context.n_threads_batch = settings["threads"]
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        self._num_vocab = json.loads((path.parent / "config.json").read_text())["vocab_size"]
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


def write_gguf(folder: Path) -> Path:
    """The Llama checkpoint of a folder as a GGUF file beside it, unless it is there already."""
    path = folder / "model.gguf"
    if path.exists():
        return path
    spec = json.loads((folder / "config.json").read_text())
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _write_spec(writer, spec)
    heads = {"q_proj": spec["num_attention_heads"], "k_proj": spec["num_key_value_heads"]}
    for name, bits in read_bfloat16(folder / "model.safetensors"):
        module = name.removesuffix(".weight")
        ours = WHOLE.get(module)
        if ours is None:
            _, _, layer, module = module.split(".", 3)
            ours = f"blk.{layer}.{MODULES[module]}"
            num_heads = heads.get(module.rpartition(".")[2])
            bits = bits if num_heads is None else _interleave(bits, num_heads)
        if bits.ndim == 1:  # norms are float32 there
            floats = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(f"{ours}.weight", floats)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            raw = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(f"{ours}.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(path)


def _write_spec(writer: Any, spec: dict[str, Any]) -> None:
    writer.add_context_length(spec["max_position_embeddings"])
    writer.add_embedding_length(spec["hidden_size"])
    writer.add_block_count(spec["num_hidden_layers"])
    writer.add_feed_forward_length(spec["intermediate_size"])
    writer.add_head_count(spec["num_attention_heads"])
    writer.add_head_count_kv(spec["num_key_value_heads"])
    writer.add_rope_dimension_count(spec["head_dim"])
    writer.add_key_length(spec["head_dim"])
    writer.add_value_length(spec["head_dim"])
    writer.add_rope_freq_base(spec["rope_theta"])
    writer.add_layer_norm_rms_eps(spec["rms_norm_eps"])
    writer.add_vocab_size(spec["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def read_bfloat16(path: Path) -> list[tuple[str, np.ndarray]]:
    """Names and raw bits, uint16, of the bfloat16 tensors of a safetensors file."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8:start]))
    found = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"dtype must be BF16, got {entry['dtype']} of {name}; use bfloat16")
        first, last = (start + offset for offset in entry["data_offsets"])
        found.append((name, data[first:last].view(np.uint16).reshape(entry["shape"])))
    return found


def _interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head in the order of llama.cpp's rotary pairs: (0, 1) where ours is (0, D/2)."""
    rows, width = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def open_engine(settings: dict[str, Any]) -> LlamaCpp:
    """See the package."""
    return LlamaCpp(settings)
