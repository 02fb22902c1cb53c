"""Small random checkpoints of every family, in one file or in shards, made from shapes alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from mnemosyne.model_zoo.spec import FAMILIES, read_spec
from mnemosyne.model_zoo.tensors import tensor_shapes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def write_small(path: Path, family: str, num_shards: int, *, tied: bool, like: Path) -> Path:
    """Write a checkpoint.

    Args:
        path: the folder.
        family: as ``ModelSpec`` calls it.
        num_shards: files of weights; one has no index.
        tied: whether the head is the embedding.
        like: a checkpoint whose tokenizer, chat template and generation defaults it shares.

    Returns:
        ``path``.
    """
    shared = json.loads((like / "config.json").read_text())
    shutil.copytree(like, path)
    (path / "model.safetensors").unlink()
    config = {
        "architectures": [
            next(name for name, reader in FAMILIES.items() if reader.model_type == family),
        ],
        "model_type": family,
        "vocab_size": shared["vocab_size"],
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "rope_scaling": YARN if tied else None,
        "max_position_embeddings": 4096,
        "sliding_window": 64 if family == "mistral" else None,
        "tie_word_embeddings": tied,
        "eos_token_id": shared["eos_token_id"],
        "torch_dtype": "float32",
        "transformers_version": "4.57.6",
    }
    if family == "llama":
        del config["sliding_window"]
    (path / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.2
        for name, shape in tensor_shapes(read_spec(path)).items()
    }
    _write(path, tensors, num_shards)
    return path


def _write(path: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
    places = {name: files[index % num_shards] for index, name in enumerate(tensors)}
    for file in files:
        held = {name: tensors[name] for name, place in places.items() if place == file}
        save_file(held, path / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
