"""The yardstick model is the same wherever it is made, and its outputs are fit to measure with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from mnemosyne.model_zoo.bench import bench_spec, init_random, write_bench
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.spec import ModelSpec, read_spec
from mnemosyne.runtime.weights import load_weights
from tests.model_zoo.dense import dense_context

SMALL = dataclasses.replace(bench_spec(), vocab_size=512, width=64, mlp_width=128)


def made(spec: ModelSpec, seed: int = 0, layers: range | None = None) -> dict[str, torch.Tensor]:
    decoder = Decoder(spec, layers=layers, dtype=torch.float32, device="cpu")
    init_random(decoder, seed)
    return decoder.state_dict()


def test_weights_follow_from_the_seed() -> None:
    first, again, other = made(SMALL, 0), made(SMALL, 0), made(SMALL, 1)

    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert "norm" in name or not torch.equal(weight, other[name])


def test_weights_are_normal_and_norms_are_one() -> None:
    weights = made(SMALL)

    assert torch.equal(weights["norm.weight"], torch.ones(64))
    assert weights["embed.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weights["embed.weight"].mean().item()) < 0.02 / 512**0.5


def test_stages_are_made_as_the_whole_is() -> None:
    whole, last = made(SMALL), made(SMALL, layers=range(2, 4))

    assert torch.equal(last.pop("head.weight"), whole["embed.weight"])
    for name, weight in last.items():
        assert torch.equal(weight, whole[name])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bench(tmp_path_factory.mktemp("bench"), seed=0)


def test_the_written_model_is_the_one_made_on_the_fly(bench: Path) -> None:
    written = Decoder(read_spec(bench), dtype=torch.bfloat16, device="meta")
    load_weights(written, bench)
    fresh = Decoder(bench_spec(), dtype=torch.bfloat16, device="cpu")
    init_random(fresh, seed=0)

    assert read_spec(bench) == bench_spec()
    for (name, one), other in zip(written.state_dict().items(), fresh.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_outputs_in_bfloat16_are_finite_and_varied(bench: Path) -> None:
    decoder = Decoder(read_spec(bench), dtype=torch.bfloat16, device="meta")
    load_weights(decoder, bench)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32_000, (64,), generator=generator)

    context = dense_context(decoder.spec.windows)
    logits_TV = decoder.logits(decoder(ids, torch.arange(64), context))

    assert logits_TV.isfinite().all()
    assert len(logits_TV.argmax(-1).unique()) > 16
    assert not torch.equal(logits_TV.argmax(-1), ids)


def test_transformers_reads_the_written_model(bench: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(bench)

    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters == {"rope_theta": 500_000.0, "rope_type": "default"}
    assert model.num_parameters() == 77_865_984
