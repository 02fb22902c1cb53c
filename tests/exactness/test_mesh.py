"""Every mesh gives the tokens of one process, in float64, and the same outputs on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne import LLM, SamplingParams
from mnemosyne.model_zoo.haystack import Recital, haystack
from mnemosyne.model_zoo.needle import write_needle
from tests.model_zoo.tiny import VOCAB_SIZE, oracle, tiny_checkpoint
from tests.ranks import run_ranks

LENGTHS = (1, 5, 33, 64, 97, 130)
MAX_TOKENS = 24
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_layers": 4, "tied": True},
    "qwen3": {"family": "qwen3", "num_layers": 5},
}
MESHES = [
    {"kvp": 2},
    {"tp": 2},
    {"pp": 2},
    {"kvp": 2, "tp": 2},
    {"pp": 2, "kvp": 2},
    {"pp": 2, "tp": 2},
    {"kvp": 4},
    {"pp": 4},
    {"kvp": 2, "ffn": "wide"},
    {"kvp": 2, "tp": 2, "ffn": "wide"},
    {"tp": 4},  # twice as many as KV heads
    {"pp": 2, "kvp": 2, "tp": 2},
    {"pp": 2, "kvp": 2, "tp": 2, "ffn": "wide"},
]


def _prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB_SIZE, length) for length in LENGTHS]


def _open(path: Path, chunk: int | str, mesh: dict[str, Any], **cache: Any) -> LLM:
    return LLM(
        str(path),
        dtype="float64",
        device="cpu",
        schedule={"chunk": chunk, "target_tbt": 0.05},
        cache={"max_tokens": 1024, "page_size": 16, **cache},
        mesh=mesh,
    )


def _params() -> SamplingParams:
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=VOCAB_SIZE)


def _serve(paths: list[Path], mesh: dict[str, Any], chunks: list[int | str]) -> list[Any]:
    """Tokens and log-probabilities of each checkpoint and chunk rule, as this rank sees them."""
    torch.set_num_threads(1)
    found = []
    # 64 tokens per group: the longest prompt crosses three groups, and decodes cross into new ones
    cache = {"max_tokens_per_group": 64} if mesh.get("kvp", 1) == 4 else {}
    cache = {"max_tokens_per_group": 80} if mesh.get("kvp", 1) == 2 else cache
    for path in paths:
        for chunk in chunks:
            with _open(path, chunk, mesh, **cache) as llm:
                outputs = llm.generate(_prompts(), _params())
            found.append([(o.error, o.token_ids, _logprobs(o)) for o in outputs])
    return found


def _logprobs(output: Any) -> np.ndarray:
    """Of every word at every position, ``[T, V]``: the logits but for a constant per row."""
    return np.array([[value for _, value in sorted(entry.top)] for entry in output.logprobs])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mesh")
    return [tiny_checkpoint(root / name, **fields) for name, fields in CHECKPOINTS.items()]


@pytest.fixture(scope="module")
def expected(paths: list[Path]) -> list[Any]:
    """Tokens of one process, which are those of transformers."""
    found = _serve(paths, {}, [33])
    for path, outputs in zip(paths, found, strict=True):
        model = oracle(path)
        model.generation_config.pad_token_id = 0
        for prompt, (_, token_ids, _) in zip(_prompts(), outputs, strict=True):
            ids = torch.from_numpy(prompt)[None]
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=MAX_TOKENS,
            )
            assert theirs[0, len(prompt) :].tolist() == token_ids
    return found


def _check(mesh: dict[str, Any], paths: list[Path], expected: list[Any], chunks: list[Any]) -> None:
    world_size = int(np.prod([mesh.get(axis, 1) for axis in ("pp", "kvp", "tp")]))
    by_rank = run_ranks(_serve, world_size, paths, mesh, chunks, timeout_s=280)

    wanted = [outputs for outputs in expected for _ in chunks]
    for found in by_rank:
        for outputs, want in zip(found, wanted, strict=True):
            assert [(error, ids) for error, ids, _ in outputs] == [
                (error, ids) for error, ids, _ in want
            ]
            for (_, _, mine), (_, _, theirs) in zip(outputs, want, strict=True):
                assert mine.shape == theirs.shape == (MAX_TOKENS, VOCAB_SIZE)
                assert np.abs(mine - theirs).max() < 1e-10


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_tokens_are_those_of_one_process_on_every_rank(mesh, paths, expected):
    num_axes = sum(mesh.get(axis, 1) > 1 for axis in ("pp", "kvp", "tp"))
    # eight ranks on a small machine take long: one family there, both in the slow test
    num_families = 1 if num_axes == 3 else 2
    chunks = [33, "adaptive"] if num_axes == 1 else [33]

    _check(mesh, paths[:num_families], expected[:num_families], chunks)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_tokens_do_not_depend_on_the_chunk_rule_either(mesh, paths, expected):
    _check(mesh, paths, expected, [1, 33, "adaptive"])


GROUP_TOKENS = 256  # of the needle prompt that each of four groups holds


def _find_passkeys(path: Path, answers_at: list[int]) -> list[bool]:
    torch.set_num_threads(1)
    recitals = [_needle_at(position) for position in answers_at]
    with LLM(
        str(path),
        dtype="float32",
        device="cpu",
        schedule={"chunk": 128},
        cache={"max_tokens": 4096, "page_size": 32, "max_tokens_per_group": GROUP_TOKENS},
        mesh={"pp": 2, "kvp": 4},
    ) as llm:
        params = SamplingParams(max_tokens=10, temperature=0.0)
        outputs = llm.generate([recital.prompt_ids for recital in recitals], params)
    return [o.token_ids == r.answer_ids.tolist() for o, r in zip(outputs, recitals, strict=True)]


def _needle_at(position: int) -> Recital:
    """A prompt over all four groups whose passkey begins at a position."""
    num_tokens = 4 * GROUP_TOKENS - 12
    recital = haystack(num_tokens, depth=0.0, seed=position)
    num_free = num_tokens - len(recital.answer_ids) - 3
    found = haystack(num_tokens, depth=(position - recital.answer_at) / num_free, seed=position)
    assert found.answer_at == position
    return found


def test_a_passkey_is_found_wherever_it_is_hidden_among_eight_ranks(tmp_path):
    path = write_needle(tmp_path / "needle")
    inside = [2, 130, 300, 700, 1000]
    around_boundaries = [
        boundary + offset
        for boundary in (GROUP_TOKENS, 2 * GROUP_TOKENS, 3 * GROUP_TOKENS)
        for offset in (-7, -6, -3, -1, 0, 1)  # six words: before, across and after the boundary
    ]

    by_rank = run_ranks(_find_passkeys, 8, path, inside + around_boundaries)

    assert by_rank == [[True] * (len(inside) + len(around_boundaries))] * 8
