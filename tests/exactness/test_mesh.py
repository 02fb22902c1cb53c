"""Every mesh gives the tokens of one process, in float64, and the same outputs on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne import LLM, SamplingParams
from tests.model_zoo.tiny import VOCAB_SIZE, tiny_checkpoint
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
    {"kvp": 2, "tp": 2, "ffn": "wide"},
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
    return SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=2)


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


def _logprobs(output: Any) -> list[float]:
    return [entry.logprob for entry in output.logprobs]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("mesh")
    return [tiny_checkpoint(root / name, **fields) for name, fields in CHECKPOINTS.items()]


@pytest.fixture(scope="module")
def expected(paths: list[Path]) -> list[Any]:
    return _serve(paths, {}, [33])


@pytest.mark.parametrize(
    "mesh", MESHES, ids=lambda mesh: "-".join(f"{k}{v}" for k, v in mesh.items())
)
def test_tokens_are_those_of_one_process_on_every_rank(mesh, paths, expected):
    degrees = [mesh.get(axis, 1) for axis in ("pp", "kvp", "tp")]
    chunks: list[int | str] = [1, 33, "adaptive"] if len(mesh) == 1 else [33]

    by_rank = run_ranks(_serve, int(np.prod(degrees)), paths, mesh, chunks)

    for found in by_rank:
        wanted = [outputs for outputs in expected for _ in chunks]
        for outputs, want in zip(found, wanted, strict=True):
            assert [(error, ids) for error, ids, _ in outputs] == [
                (error, ids) for error, ids, _ in want
            ]
            for (_, _, mine), (_, _, theirs) in zip(outputs, want, strict=True):
                assert np.abs(np.array(mine) - np.array(theirs)).max() < 1e-10
