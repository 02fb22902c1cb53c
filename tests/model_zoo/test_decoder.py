"""The decoder computes what transformers computes, whole or cut into stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.runtime.weights import load_weights
from tests.model_zoo.dense import dense_context
from tests.model_zoo.tiny import (
    FAMILIES,
    ROPES,
    VOCAB_SIZE,
    oracle_logits,
    tiny_checkpoint,
)

# transformers computes norms, rotary angles and the softmax in float32 whatever the dtype.
ORACLE_ERROR = 2e-5  # relative to the largest logit


def load(path: Path, dtype: torch.dtype = torch.float64, layers: range | None = None) -> Decoder:
    decoder = Decoder(read_spec(path), layers=layers, dtype=dtype, device="meta")
    load_weights(decoder, path)
    return decoder


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()


def dense_logits(decoder: Decoder, token_ids: list[int], *, chunk: int | None = None) -> Tensor:
    context = dense_context(decoder.spec.reaches, decoder.spec.scale_of_scores)
    ids, positions = torch.tensor(token_ids), torch.arange(len(token_ids))
    size = chunk or len(token_ids)
    parts = zip(ids.split(size), positions.split(size), strict=True)
    return torch.cat([decoder.logits(decoder(x, at, context)) for x, at in parts])


def assert_agrees(path: Path, token_ids: list[int]) -> None:
    """Logits of every position agree with transformers."""
    expected = oracle_logits(path, token_ids)
    actual = dense_logits(load(path), token_ids)
    error = (actual - expected).abs().max() / expected.abs().max()
    assert actual.dtype == torch.float64
    assert error < ORACLE_ERROR, f"relative error {error:.2e}"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, rope: str, tied: bool
) -> None:
    path = tiny_checkpoint(tmp_path, family=family, rope=rope, tied=tied)

    assert_agrees(path, prompt(150))


@pytest.mark.parametrize(
    "choices",
    [
        {"family": "llama", "bias": True},
        {"family": "llama", "head_dim": 16},
        {"family": "mistral", "head_dim": 6},
        {"family": "qwen2", "head_dim": 16},
        {"family": "qwen3", "bias": True, "head_dim": 24},
    ],
    ids=str,
)
def test_biases_and_head_sizes_are_those_of_transformers(
    tmp_path: Path, choices: dict[str, Any]
) -> None:
    path = tiny_checkpoint(tmp_path, **choices)

    assert_agrees(path, prompt(40))


@pytest.mark.parametrize(
    "choices",
    [
        {"family": "mistral"},
        {"family": "qwen2"},
        {"family": "qwen3"},
        {"family": "qwen2", "layer_types": ["sliding_attention", "full_attention"]},
        {"family": "qwen3", "layer_types": ["sliding_attention", "sliding_attention"]},
    ],
    ids=str,
)
def test_windows_are_those_of_transformers(tmp_path: Path, choices: dict[str, Any]) -> None:
    path = tiny_checkpoint(tmp_path, window=5, **choices)

    assert_agrees(path, prompt(40))


@pytest.mark.parametrize("wrong", [4, 6, None])
def test_a_window_off_by_one_would_be_noticed(tmp_path: Path, wrong: int | None) -> None:
    path = tiny_checkpoint(tmp_path, family="mistral", window=5)
    decoder = load(path)
    ids = prompt(40)

    context = dense_context((wrong, wrong))
    actual = decoder.logits(decoder(torch.tensor(ids), torch.arange(40), context))
    expected = oracle_logits(path, ids)

    assert (actual - expected).abs().max() / expected.abs().max() > 100 * ORACLE_ERROR


@pytest.mark.parametrize("rope", [kind for kind in ROPES if kind != "default"])
@pytest.mark.parametrize("rope_form", ["old", "oldest"])
def test_older_forms_of_rope_mean_the_same(tmp_path: Path, rope: str, rope_form: str) -> None:
    old = tiny_checkpoint(tmp_path / "old", rope=rope, rope_form=rope_form)
    new = tiny_checkpoint(tmp_path / "new", rope=rope)

    assert read_spec(old) == read_spec(new)
    assert_agrees(old, prompt(20))


def test_greedy_tokens_of_the_tiny_models_vary(tmp_path: Path) -> None:
    decoder = load(tiny_checkpoint(tmp_path))
    context = dense_context(decoder.spec.windows)
    ids = prompt(8)

    hidden_TE = decoder(torch.tensor(ids), torch.arange(8), context)
    tokens = []
    for position in range(8, 40):
        tokens.append(int(decoder.logits(hidden_TE[-1:]).argmax()))
        hidden_TE = decoder(torch.tensor(tokens[-1:]), torch.tensor([position]), context)

    assert len(set(tokens)) > 8


@pytest.mark.parametrize("chunk", [1, 7])
def test_chunks_do_not_change_the_logits(tmp_path: Path, chunk: int) -> None:
    decoder = load(tiny_checkpoint(tmp_path, family="qwen3"))
    ids = prompt(30)

    whole = dense_logits(decoder, ids)
    parts = dense_logits(decoder, ids, chunk=chunk)

    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_stages_compute_the_whole_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    path = tiny_checkpoint(tmp_path, family="mistral", window=5, tied=tied, num_layers=3)
    whole, first, last = load(path), load(path, layers=range(1)), load(path, layers=range(1, 3))
    ids, positions = torch.tensor(prompt(20)), torch.arange(20)

    windows = whole.spec.windows
    hidden_TE = first(ids, positions, dense_context(windows[:1]))
    hidden_TE = last(hidden_TE, positions, dense_context(windows[1:]))
    logits_TV = last.logits(hidden_TE)

    assert torch.equal(logits_TV, whole.logits(whole(ids, positions, dense_context(windows))))
    assert first.head is None
    assert first.norm is None
    assert last.embed is None


def test_stages_hold_each_tensor_once_under_its_own_name(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, num_layers=3))
    whole = Decoder(spec, dtype=torch.float32, device="meta").checkpoint_names()
    stages = [
        Decoder(spec, layers=layers, dtype=torch.float32, device="meta").checkpoint_names()
        for layers in (range(2), range(2, 3))
    ]

    assert stages[0] | stages[1] == whole
    assert len(stages[0]) + len(stages[1]) == len(whole)


def test_building_on_the_meta_device_allocates_nothing(tmp_path: Path) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path))

    decoder = Decoder(spec, dtype=torch.bfloat16, device="meta")

    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in decoder.parameters())
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_wide_and_no_worse_than_transformers(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tiny_checkpoint(tmp_path, family="qwen3")
    ids = prompt(60)
    exact = dense_logits(load(path), ids)

    decoder = load(path, dtype)
    logits_TV = dense_logits(decoder, ids)
    peer_logits_TV = oracle_logits(path, ids, dtype)

    assert logits_TV.dtype == torch.float32
    budget = 2 * (peer_logits_TV.double() - exact).abs().max()
    budget += torch.finfo(dtype).eps * exact.abs().max()
    assert (logits_TV.double() - exact).abs().max() <= budget


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_not_rounded_on_cuda(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = load(tiny_checkpoint(tmp_path), dtype).to("cuda")
    generator = torch.Generator().manual_seed(2)
    hidden_BE = torch.randn(5, 32, generator=generator).to("cuda", dtype)

    logits_BV = decoder.logits(hidden_BE)

    exact_BV = hidden_BE.double() @ decoder.head.weight.double().t()
    assert logits_BV.dtype == torch.float32
    error = (logits_BV - exact_BV).abs().max() / exact_BV.abs().max()
    assert error < torch.finfo(dtype).eps / 64
