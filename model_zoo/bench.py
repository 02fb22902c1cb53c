"""The yardstick model: fixed sizes and random weights from a seed, in memory or on disk."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.parallel.shards import Slices, allocate, held_slices

STD = 0.02  # of every weight, as published models are initialised
DRAWS = 1 << 22  # numbers drawn at once: bounds the float32 copy that is rounded


def bench_spec() -> ModelSpec:
    """Llama architecture of 78M parameters that all measurements use."""
    return ModelSpec(
        family="llama",
        vocab_size=32_000,
        width=1024,
        num_layers=4,
        num_heads=16,
        num_kv_heads=4,
        head_dim=64,
        mlp_width=2816,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500_000.0, dim=64),
        tied=True,
        windows=(None,) * 4,
        max_positions=1 << 24,
        dtype="bfloat16",
    )


def init_random(decoder: Decoder, seed: int, device: torch.device | str = "cpu") -> None:
    """Fill a decoder with normal weights, norms with ones.

    A parameter's values depend on the seed and its name in a checkpoint alone: they are the same
    on every device, in every dtype up to rounding, in every stage of a pipeline and, a slice of
    them, in every shard.

    Args:
        decoder: its parameters are filled, as far as this rank holds them.
        seed: any whole number.
        device: where parameters of the meta device go.
    """
    names = decoder.checkpoint_names()
    for ours, parameter in list(decoder.named_parameters()):
        module, _, attribute = ours.rpartition(".")
        held, shape = held_slices(parameter), parameter.shape
        target = allocate(decoder.get_submodule(module), attribute, device)
        if "norm" in module.rpartition(".")[-1]:
            target.fill_(1.0)
        else:
            _fill_normal(target, held, shape, zlib.crc32(f"{seed}/{names[ours]}".encode()))


def _fill_normal(target: Tensor, held: Slices, shape: torch.Size, seed: int) -> None:
    """Draw the whole parameter in blocks of rows; keep what is held."""
    generator = torch.Generator().manual_seed(seed)
    rows, *rest = held
    block_rows = max(1, DRAWS // shape[1:].numel())
    for start in range(0, rows.stop, block_rows):
        stop = min(start + block_rows, shape[0])
        drawn = torch.randn(stop - start, *shape[1:], generator=generator, dtype=torch.float32)
        first, last = max(start, rows.start), min(stop, rows.stop)
        if first < last:
            kept = drawn[(slice(first - start, last - start), *rest)]
            target[first - rows.start : last - rows.start].copy_(kept * STD)


def write_bench(path: Path, seed: int, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the yardstick as a Hugging Face checkpoint without a tokenizer.

    Args:
        path: directory, made if need be.
        seed: as for ``init_random``.
        dtype: of the file.

    Returns:
        ``path``.
    """
    spec = bench_spec()
    decoder = Decoder(spec, dtype=dtype, device="cpu")
    init_random(decoder, seed)
    names = decoder.checkpoint_names()
    path.mkdir(parents=True, exist_ok=True)
    tensors = {names[ours]: parameter.data for ours, parameter in decoder.named_parameters()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.mlp_width,
        "rms_norm_eps": spec.norm_eps,
        "hidden_act": "silu",
        "rope_theta": spec.rope.theta,
        "max_position_embeddings": spec.max_positions,
        "tie_word_embeddings": spec.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return path
