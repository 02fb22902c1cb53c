"""Every family gives the greedy tokens of transformers, whatever the chunk, backend and mesh."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mnemosyne import LLM, SamplingParams
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from tests.engines import worker_of
from tests.model_zoo.families import FAMILIES, tiny_family
from tests.model_zoo.tiny import VOCAB_SIZE
from tests.model_zoo.wide import Wide, wide_oracle
from tests.ranks import run_ranks

LENGTHS = (5, 41, 130)
MAX_TOKENS = 48
CHUNKS: tuple[int | str, ...] = (1, 17, 64, "adaptive")
BACKENDS = ("reference", "cpu")
MESHES: tuple[dict[str, Any], ...] = ({"kvp": 2}, {"tp": 2}, {"pp": 2}, {"kvp": 2, "ffn": "wide"})
EIGHT = {"pp": 2, "kvp": 2, "tp": 2}
# One variant of a family stands for all where the others show nothing but in one process.
SERVED = (
    *("seed_oss", "smollm3-windows", "olmo3-yarn", "gemma3-half", "ministral3-half"),
    *("qwen3_moe-between", "qwen2_moe", "mixtral", "gpt_oss", "glm4_moe", "glm4_moe-groups"),
    *("minimax_m2-partial", "llama4-between", "llama4-half"),
)
NATIVE = [each.name for each in INSTRUCTION_SETS if each.why_not() is None]
WIDE: dict[str, dict[str, Any]] = {  # rows of multiples of 32, as the kernels take them
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 32, "intermediate_size": 64},
    "gpt_oss": {"head_dim": 32, "intermediate_size": 64},
    "glm4_moe": {"head_dim": 32, "moe_intermediate_size": 32, "intermediate_size": 64},
    "gemma3": {"head_dim": 32, "intermediate_size": 64},
    "llama4": {"head_dim": 32, "intermediate_size": 64},
}

RECORDED: dict[str, dict[str, Any]] = {  # those whose decodes are replayed on the CPU
    "seed_oss-biased": {"head_dim": 32, "intermediate_size": 64},
    "smollm3-windows": {"hidden_size": 128, "intermediate_size": 64},
    "olmo3-yarn": {"hidden_size": 128, "intermediate_size": 64},
}


class Case(NamedTuple):
    """One way to serve a family."""

    family: str
    chunk: int | str
    backend: str
    mesh: dict[str, Any]


def paired(families: Sequence[str], meshes: tuple[dict[str, Any], ...]) -> list[Case]:
    """Cases in which every two values of different kinds meet at least once."""
    every = [Case(*values) for values in product(families, CHUNKS, BACKENDS, meshes)]
    unmet = {pair for case in every for pair in _pairs(case)}
    chosen = []
    while unmet:
        best = max(every, key=lambda case: len(_pairs(case) & unmet))
        chosen.append(best)
        unmet -= _pairs(best)
    return sorted(chosen, key=lambda case: case.family)


def _pairs(case: Case) -> set[tuple[int, str, int, str]]:
    values = [str(value) for value in case]
    return {
        (i, values[i], j, values[j]) for i in range(len(values)) for j in range(i + 1, len(values))
    }


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB_SIZE, length) for length in LENGTHS]


def serve(paths: dict[str, Path], cases: list[Case]) -> list[list[list[int]]]:
    """Greedy tokens of each case, prompts in one batch."""
    torch.set_num_threads(1)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    found = []
    for case in cases:
        # the longest prompt crosses from one group to the next, and so do its decodes
        groups = {"max_tokens_per_group": 96} if "kvp" in case.mesh else {}
        with LLM(
            str(paths[case.family]),
            dtype="float64",
            device="cpu",
            attention=case.backend,
            schedule={"chunk": case.chunk, "target_tbt": 0.05},
            cache={"max_tokens": 1024, "page_size": 16, **groups},
            mesh=case.mesh,
        ) as llm:
            outputs = llm.generate(prompts(), params)
        assert [output.error for output in outputs] == [None] * len(LENGTHS), case
        found.append([output.token_ids for output in outputs])
    return found


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: tiny_family(root / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def expected(paths: dict[str, Path]) -> dict[str, list[list[int]]]:
    """Greedy tokens: each is what transformers gives after those before it."""
    cases = [Case(name, 64, "reference", {}) for name in FAMILIES]
    found = dict(zip(FAMILIES, serve(paths, cases), strict=True))
    for name, path in paths.items():
        model = wide_oracle(path)
        for prompt, token_ids in zip(prompts(), found[name], strict=True):
            assert token_ids == _greedy_after(model, prompt, token_ids), name
        assert len({token for ids in found[name] for token in ids}) > 4, "answers all alike"
    return found


@torch.inference_mode()
def _greedy_after(model: Any, prompt: np.ndarray, token_ids: list[int]) -> list[int]:
    """Ask transformers what follows the prompt and each run of the tokens but the whole of them."""
    ids = torch.from_numpy(np.concatenate((prompt, token_ids[:-1])))[None]
    with Wide():
        logits_TV = model(input_ids=ids, use_cache=False).logits[0]
    found: list[int] = logits_TV[len(prompt) - 1 :].argmax(-1).tolist()
    return found


def check(found: list[list[list[int]]], cases: list[Case], expected: dict[str, Any]) -> None:
    """Tokens of all cases are those of transformers; every case that differs is named."""
    wrong = [
        case for case, tokens in zip(cases, found, strict=True) if tokens != expected[case.family]
    ]
    assert not wrong


def bfloat16_logprobs(path: Path, operators: str, batches: list[list[np.ndarray]]) -> list[Any]:
    """Tokens and their log-probabilities of all prompts, batch by batch."""
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)
    with LLM(
        str(path),
        dtype="bfloat16",
        device="cpu",
        attention="reference",
        operators=operators,
        schedule={"chunk": 64},
        cache={"max_tokens": 1024, "page_size": 16},
    ) as llm:
        outputs = [output for batch in batches for output in llm.generate(batch, params)]
    return [(o.token_ids, [entry.logprob for entry in o.logprobs]) for o in outputs]


@pytest.mark.skipif(not NATIVE, reason="no kernels for this processor")
@pytest.mark.parametrize("name", WIDE)
def test_no_company_changes_a_bit_of_what_the_kernels_give(tmp_path: Path, name: str) -> None:
    path = tiny_family(tmp_path, name, **WIDE[name])
    together = [prompts()]
    alone = [[prompt] for prompt in prompts()]

    found = bfloat16_logprobs(path, NATIVE[0], together + alone)

    assert found[: len(LENGTHS)] == found[len(LENGTHS) :]


@pytest.mark.skipif(not NATIVE, reason="no kernels for this processor")
@pytest.mark.parametrize("chunk", [1, 17])  # decodes, and prompts
@pytest.mark.parametrize("name", WIDE)
def test_the_kernels_are_close_to_the_reference_in_float32(
    tmp_path: Path, name: str, chunk: int
) -> None:
    path = tiny_family(tmp_path, name, **WIDE[name])
    found = []
    for dtype, backend in (("float64", "reference"), ("float32", "auto")):
        with LLM(
            str(path),
            dtype=dtype,
            device="cpu",
            attention=backend,
            schedule={"chunk": chunk},
            cache={"max_tokens": 1024, "page_size": 16},
        ) as llm:
            outputs = llm.generate(
                prompts(), SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            )
        found.append([[e.logprob for e in o.prompt_logprobs if e] for o in outputs])

    for exact, kernels in zip(*found, strict=True):
        assert kernels == pytest.approx(exact, abs=2e-3)


@pytest.mark.skipif(not NATIVE, reason="no kernels for this processor")
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_decodes_give_the_bits_of_computed_ones(tmp_path: Path, name: str) -> None:
    path = tiny_family(tmp_path, name, **RECORDED[name])
    params, found = SamplingParams(max_tokens=40, temperature=0.0, logprobs=1), []
    for compiles in ("auto", "none"):
        with LLM(
            str(path),
            dtype="bfloat16",
            device="cpu",
            compile=compiles,
            cache={"max_tokens": 1024, "page_size": 16},
        ) as llm:
            assert (worker_of(llm)._graphs is not None) == (compiles == "auto")
            outputs = llm.generate(prompts(), params)
        found.append([(o.token_ids, [entry.logprob for entry in o.logprobs]) for o in outputs])

    assert found[0] == found[1]


@pytest.mark.timeout(900)
def test_tokens_are_those_of_transformers_on_two_ranks(paths, expected):
    cases = paired(SERVED, MESHES)

    for found in run_ranks(serve, 2, paths, cases, timeout_s=850):
        check(found, cases, expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_tokens_are_those_of_transformers_for_every_chunk_backend_and_mesh(paths, expected):
    cases = [Case(*values) for values in product(FAMILIES, CHUNKS, BACKENDS, MESHES)]

    for found in run_ranks(serve, 2, paths, cases, timeout_s=3500):
        check(found, cases, expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tokens_are_those_of_transformers_on_eight_ranks(paths, expected):
    cases = [Case(name, 17, "cpu", EIGHT) for name in FAMILIES]

    for found in run_ranks(serve, 8, paths, cases, timeout_s=850):
        check(found, cases, expected)
