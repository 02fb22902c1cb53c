"""Experts of 4-bit numbers are unpacked on load, exactly, from files as gpt-oss has them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.model_zoo.families import tiny_family
from tests.model_zoo.test_decoder import dense_logits, load, prompt


def test_packed_experts_are_loaded_as_transformers_unpacks_them(tmp_path: Path) -> None:
    path = tiny_family(tmp_path, "gpt_oss", intermediate_size=64)
    file, generator = path / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    unpacked = {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = experts, rows, columns // 32
        blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        unpacked[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float64)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))

    decoder = load(path)

    experts = decoder.decoder_layers()[1].mlp.experts
    both = unpacked["model.layers.1.mlp.experts.gate_up_proj"]  # inputs before outputs
    assert torch.equal(experts.gate, both[..., ::2].transpose(1, 2))
    assert torch.equal(experts.up, both[..., 1::2].transpose(1, 2))
    down = unpacked["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(experts.down, down.transpose(1, 2))
    assert dense_logits(decoder, prompt(20)).isfinite().all()
