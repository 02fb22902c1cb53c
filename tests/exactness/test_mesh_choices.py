"""Meshes with every choice of what computes: the float64 tokens of one process."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from mnemosyne import LLM
from tests.engines import greedy, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint
from tests.ranks import run_ranks

PROMPTS = random_prompts((1, 5, 97, 33))
MAX_TOKENS = 8
COMPILED_MESHES: list[dict[str, Any]] = [
    {"tp": 2},
    {"kvp": 2},
    {"pp": 2},
    {"kvp": 2, "ffn": "wide"},
]


def _open(path: Path, mesh: dict[str, Any], **choices: Any) -> LLM:
    # the longest prompt crosses into the second group, and decodes of it are shared
    cache = {"max_tokens_per_group": 64} if mesh.get("kvp", 1) > 1 else {}
    return LLM(
        str(path),
        dtype="float64",
        device="cpu",
        schedule={"chunk": 33},
        cache={"max_tokens": 512, "page_size": 16, **cache},
        mesh=mesh,
        **choices,
    )


def _serve(
    path: Path, cache: Path, meshes: list[dict[str, Any]], choices: dict[str, Any]
) -> list[tuple[list[list[int]], int]]:
    """On each mesh the tokens of every prompt, and graphs that were compiled while serving."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    torch.set_num_threads(1)
    # importing the compiler warns of what torch itself still uses
    warnings.filterwarnings("ignore", ".*torch.jit.script.*", DeprecationWarning)
    found = []
    for mesh in meshes:
        with _open(path, mesh, **choices) as llm:
            before = counters["stats"]["unique_graphs"]
            outputs = llm.generate(PROMPTS, greedy(MAX_TOKENS))
            num_graphs = counters["stats"]["unique_graphs"] - before
        assert all(output.error is None for output in outputs)
        found.append(([output.token_ids for output in outputs], num_graphs))
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("choices")
    return tiny_checkpoint(root / "tiny", family="qwen3", num_layers=4)


@pytest.fixture(scope="module")
def expected(path: Path) -> list[list[int]]:
    cache = {"max_tokens": 512, "page_size": 16}
    with LLM(str(path), dtype="float64", device="cpu", schedule={"chunk": 33}, cache=cache) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, greedy(MAX_TOKENS))]


@pytest.mark.parametrize("attention", ["flex", "reference"])
@pytest.mark.parametrize("mesh", [{"kvp": 2}, {"pp": 2, "kvp": 2, "tp": 2}], ids=str)
def test_backends_give_the_tokens_of_one_process_on_every_rank(
    path: Path,
    expected: list[list[int]],
    mesh: dict[str, int],
    attention: str,
    tmp_path: Path,
) -> None:
    num_ranks = int(np.prod(list(mesh.values())))
    choices = {"attention": attention, "operators": "torch"}

    found = run_ranks(_serve, num_ranks, path, tmp_path, [mesh], choices, timeout_s=280)

    assert [tokens for ((tokens, _),) in found] == [expected] * num_ranks


@pytest.mark.timeout(600)
def test_compiled_steps_give_the_tokens_of_one_process_on_every_mesh(
    path: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    choices = {"compile": "step", "operators": "torch"}

    by_rank = run_ranks(_serve, 2, path, tmp_path, COMPILED_MESHES, choices, timeout_s=550)

    for found in by_rank:
        for mesh, (tokens, num_graphs) in zip(COMPILED_MESHES, found, strict=True):
            assert tokens == expected, mesh
            assert num_graphs == 0, f"a step compiled something on {mesh}"
