"""The main claim: every path gives the tokens and logits of one dense forward, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from tests.model_zoo.dense import dense_context
from tests.model_zoo.tiny import VOCAB_SIZE, oracle, tiny_checkpoint

NUM_TOKENS = 64
LENGTHS = (1, 5, 16, 33, 64, 97, 130, 41)
CHUNKS: tuple[int | str, ...] = (1, 7, 64, "adaptive")
SLOW = pytest.mark.slow
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama-linear-old": {"family": "llama", "rope": "linear", "rope_form": "oldest"},
    "llama-llama3-tied": {"family": "llama", "rope": "llama3", "rope_form": "old", "tied": True},
    "llama-yarn-biased": {"family": "llama", "rope": "yarn", "bias": True, "head_dim": 16},
    "mistral-window": {"family": "mistral", "window": 24},
    "mistral-tied": {"family": "mistral", "tied": True},
    "qwen2-windows": {"family": "qwen2", "window": 24, "num_layers": 3},
    "qwen2-yarn-tied": {"family": "qwen2", "rope": "yarn", "tied": True},
    "qwen3": {"family": "qwen3", "bias": True},
    "qwen3-yarn-tied": {"family": "qwen3", "rope": "yarn", "tied": True},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exactness") / request.param
    return tiny_checkpoint(path, **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB_SIZE, length) for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[np.ndarray]) -> list[list[int]]:
    """Greedy tokens of transformers, each prompt by itself."""
    model = oracle(checkpoint)
    model.generation_config.pad_token_id = 0
    tokens = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        mask = torch.ones_like(ids)
        output = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS
        )
        tokens.append(output[0, len(prompt) :].tolist())
    assert len(set(map(tuple, tokens))) > len(prompts) // 2, "a model that answers all alike"
    return tokens


def _llm(path: Path, backend: str, chunk: int | str) -> LLM:
    return LLM(
        str(path),
        dtype="float64",
        device="cpu",
        attention=backend,
        schedule={"chunk": chunk, "target_tbt": 0.02},
        cache={"max_tokens": "4K", "page_size": 16},
    )


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("flex", marks=SLOW)])
def test_tokens_are_those_of_transformers_alone_and_together(
    checkpoint, prompts, expected, backend
):
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
    for chunk in CHUNKS:
        with _llm(checkpoint, backend, chunk) as llm:
            together = llm.generate(prompts, params)
            alone = llm.generate(prompts[5], params)

        assert [output.error for output in together] == [None] * len(prompts)
        assert [output.token_ids for output in together] == expected, chunk
        assert alone[0].token_ids == expected[5], chunk


def test_tokens_of_flex_are_those_of_transformers(checkpoint, prompts, expected):
    # FlexAttention in float64 is not compiled on CPU and takes milliseconds a call: a short run
    chosen = (1, 3, 6)
    params = SamplingParams(max_tokens=12, temperature=0.0)
    with _llm(checkpoint, "flex", 33) as llm:
        together = llm.generate([prompts[i] for i in chosen], params)

    assert [output.token_ids for output in together] == [expected[i][:12] for i in chosen]


class RecordingModel:
    """A decoder that keeps the logits it gave."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.recorded: list[Tensor] = []

    def __call__(self, *arguments: Any) -> Tensor:
        return self._decoder(*arguments)

    def logits(self, hidden_BE: Tensor) -> Tensor:
        logits_BV = self._decoder.logits(hidden_BE)
        self.recorded.append(logits_BV.clone())
        return logits_BV


def _dense_logits(decoder: Any, ids: np.ndarray) -> Tensor:
    """Logits ``[T, V]`` of one forward over all tokens, keys and values just as projected."""
    context = dense_context(decoder.spec.windows)
    with torch.inference_mode():
        hidden_TE = decoder(torch.from_numpy(ids), torch.arange(len(ids)), context)
        return decoder.logits(hidden_TE)


def _sampled_logits(llm: LLM, prompt: np.ndarray) -> tuple[list[int], Iterator[Tensor]]:
    worker = llm.engine._executor.worker
    recording = RecordingModel(worker._model)
    worker._model = recording
    output = llm.generate(prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0))[0]
    return output.token_ids, (logits_BV[0] for logits_BV in recording.recorded)


@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("flex", marks=SLOW)])
def test_logits_are_within_1e_10_of_a_dense_forward(checkpoint, prompts, backend):
    for chunk in (7, 64, "adaptive"):
        with _llm(checkpoint, backend, chunk) as llm:
            decoder = llm.engine._executor.worker._model
            token_ids, logits = _sampled_logits(llm, prompts[6])

        ids = np.concatenate([prompts[6], token_ids])
        dense_TV = _dense_logits(decoder, ids)[len(prompts[6]) - 1 : -1]
        actual_TV = torch.stack(list(logits))
        assert actual_TV.shape == dense_TV.shape
        assert actual_TV.dtype == torch.float64
        assert (actual_TV - dense_TV).abs().max() < 1e-10


def test_logits_are_within_2e_5_of_transformers(checkpoint, prompts):
    with _llm(checkpoint, "cpu", 33) as llm:
        token_ids, logits = _sampled_logits(llm, prompts[6])

    ids = torch.from_numpy(np.concatenate([prompts[6], token_ids]))[None]
    with torch.inference_mode():
        theirs_TV = oracle(checkpoint)(ids).logits[0, len(prompts[6]) - 1 : -1]
    actual_TV = torch.stack(list(logits))
    assert (actual_TV - theirs_TV).abs().max() < 2e-5 * theirs_TV.abs().max()
