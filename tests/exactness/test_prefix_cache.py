"""Cached prefixes change no token and no logit, however they came to be cached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput, SamplingParams
from mnemosyne.schedule.plan import Plan
from tests.engines import (
    PAGE_SIZE,
    WrappedExecutor,
    add,
    drain,
    greedy,
    model_of,
    open_tiny,
    pages_used,
    pool_of,
    random_prompts,
)
from tests.model_zoo.tiny import VOCAB_SIZE, tiny_checkpoint
from tests.ranks import run_ranks

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "mistral-window": {"family": "mistral", "window": 24},
    "qwen2-windows": {"family": "qwen2", "window": 24, "num_layers": 3},
    "qwen3": {"family": "qwen3", "bias": True},
}
FIRST, OTHER = random_prompts((130, 40))
TURNS = [  # a conversation of three turns, a branch from its middle, and its beginning again
    FIRST,
    np.concatenate([FIRST, OTHER[:9]]),
    np.concatenate([FIRST, OTHER]),
    np.concatenate([FIRST[:70], OTHER]),
    FIRST,
]
PARAMS = greedy(12, logprobs=VOCAB_SIZE)
NATIVE = [each.name for each in INSTRUCTION_SETS if each.why_not() is None][:2]  # the fastest ones


def logprobs_of(output: RequestOutput) -> np.ndarray:
    """Of every word at every position, ``[T, V]``: the logits but for a constant per row."""
    assert output.error is None
    assert output.logprobs is not None
    return np.array([[value for _, value in sorted(entry.top)] for entry in output.logprobs])


def assert_equal(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    for ours, theirs in zip(outputs, expected, strict=True):
        assert np.abs(logprobs_of(ours) - logprobs_of(theirs)).max() < 1e-10


def poison_unused(llm: LLM) -> None:
    """From now on, fill every page with nan before a step in which nobody may read it."""
    engine, pool = llm.engine, pool_of(llm)

    def poison(plan: Plan) -> None:
        if plan.released or plan.admitted:
            pages = engine.scheduler.ledger.unused(0)
            slots = (torch.from_numpy(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).ravel()
            for part in (*pool.k, *pool.v):
                part[:, slots] = torch.nan

    WrappedExecutor(engine, before=poison)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prefix") / request.param
    return tiny_checkpoint(path, **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def cold(checkpoint: Path) -> list[RequestOutput]:
    """Every turn over an empty cache."""
    with open_tiny(checkpoint, chunk=64) as llm:
        outputs = []
        for turn in TURNS:
            llm.clear_cache()
            outputs += llm.generate(turn, PARAMS)
    assert [output.metrics.num_cached for output in outputs] == [0] * len(TURNS)
    return outputs


@pytest.mark.parametrize("chunk", [7, 64, "adaptive"])
def test_warm_and_half_warm_prompts_give_the_logits_of_cold_ones(
    checkpoint: Path, cold: list[RequestOutput], chunk: int | str
) -> None:
    with open_tiny(checkpoint, chunk=chunk, attention="reference") as llm:
        poison_unused(llm)
        outputs = [output for turn in TURNS for output in llm.generate(turn, PARAMS)]
        kinds = llm.engine.scheduler.ledger.kinds

    # layers that forget have no window where the branch begins
    forgets = bool(kinds.windows)
    assert [o.metrics.num_cached for o in outputs] == [0, 128, 128, 0 if forgets else 64, 128]
    assert_equal(outputs, cold)


def test_turns_that_come_at_once_share_and_give_the_same(
    checkpoint: Path, cold: list[RequestOutput]
) -> None:
    with open_tiny(checkpoint, attention="reference", max_tokens=20 * PAGE_SIZE) as llm:
        poison_unused(llm)
        outputs = llm.generate(TURNS, PARAMS)
        assert pages_used(llm.engine) == 0
        forgets = bool(llm.engine.scheduler.ledger.kinds.windows)

    num_cached = sum(output.metrics.num_cached for output in outputs)
    assert num_cached >= (0 if forgets else 128 + 64)  # windows are known once a prompt ends
    assert_equal(outputs, cold)


def test_samples_prefill_once_and_are_those_of_an_engine_without_a_cache(checkpoint: Path) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5, n=5)
    with open_tiny(checkpoint) as llm:
        (output,) = llm.generate(FIRST, params)
    with LLM(
        str(checkpoint),
        dtype="float64",
        device="cpu",
        schedule={"chunk": 7},
        cache={"max_tokens": 2048, "page_size": PAGE_SIZE, "prefix": "off"},
    ) as llm:
        (expected,) = llm.generate(FIRST, params)

    computed = [sum(sample.metrics.chunks) for sample in output.samples]
    assert computed == [130, 2, 2, 2, 2]
    assert [sum(sample.metrics.chunks) for sample in expected.samples] == [130] * 5
    assert [s.token_ids for s in output.samples] == [s.token_ids for s in expected.samples]


def test_a_prompt_that_is_reported_is_computed(checkpoint: Path, cold: list[RequestOutput]) -> None:
    with open_tiny(checkpoint) as llm:
        llm.generate(FIRST, PARAMS)
        (output,) = llm.generate(FIRST, greedy(2, prompt_logprobs=0))

    assert output.metrics.num_cached == 0
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(FIRST)
    assert output.token_ids == cold[0].token_ids[:2]


def test_a_broken_request_leaves_whole_pages_to_others_and_no_others(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tiny_checkpoint(tmp_path_factory.mktemp("prefix") / "broken")
    broken = np.where(FIRST == 0, 1, FIRST)
    broken[70] = 0
    never = {"logit_bias": {0: -100.0}}
    whole = np.where(broken == 0, 1, broken)
    with open_tiny(path, attention="reference") as llm:
        model_of(llm).embed.weight[0] = torch.nan
        (expected,) = llm.generate(whole, greedy(9, **never))
        llm.clear_cache()
        (failed,) = llm.generate(broken, greedy(9, **never))
        outputs = llm.generate([broken, whole], greedy(9, **never))

    assert failed.finish_reason == outputs[0].finish_reason == "error"
    assert [output.metrics.num_cached for output in outputs] == [64, 64]
    assert outputs[1].token_ids == expected.token_ids


def test_a_sweep_of_step_times_forgets_what_it_writes_over(
    checkpoint: Path, cold: list[RequestOutput]
) -> None:
    with open_tiny(checkpoint, chunk="adaptive", saved_fit=False) as llm:
        llm.generate(FIRST, PARAMS)
        llm.engine.measure()
        (output,) = llm.generate(FIRST, PARAMS)

    assert output.metrics.num_cached == 0
    assert_equal([output], cold[:1])


def _serve_turns(path: Path, mesh: dict[str, int]) -> list[tuple[int, list[int], np.ndarray]]:
    """Each turn after the others, as this rank sees it."""
    torch.set_num_threads(1)
    with LLM(
        str(path),
        dtype="float64",
        device="cpu",
        schedule={"chunk": 33},
        cache={"max_tokens": 512, "page_size": PAGE_SIZE, "max_tokens_per_group": 80},
        mesh=mesh,
    ) as llm:
        outputs = [output for turn in TURNS for output in llm.generate(turn, PARAMS)]
    return [(o.metrics.num_cached, o.token_ids, logprobs_of(o)) for o in outputs]


@pytest.mark.parametrize("mesh", [{"kvp": 3}, {"pp": 2, "kvp": 3}], ids=str)
def test_groups_of_a_mesh_share_what_each_holds(
    tmp_path_factory: pytest.TempPathFactory, mesh: dict[str, int]
) -> None:
    path = tiny_checkpoint(tmp_path_factory.mktemp("prefix") / "mesh", **CHECKPOINTS["qwen3"])
    with open_tiny(path) as llm:
        cold = []
        for turn in TURNS:
            llm.clear_cache()
            cold += llm.generate(turn, PARAMS)

    for found in run_ranks(_serve_turns, int(np.prod([*mesh.values()])), path, mesh, timeout_s=280):
        assert [num_cached for num_cached, _, _ in found] == [0, 128, 128, 64, 128]
        assert [ids for _, ids, _ in found] == [output.token_ids for output in cold]
        for (_, _, ours), theirs in zip(found, cold, strict=True):
            assert np.abs(ours - logprobs_of(theirs)).max() < 1e-10


@pytest.fixture(
    scope="module", params=[n for n in NATIVE if n in ("amx", "avx512", "avx2", "neon")]
)
def native(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, LLM]]:
    """Two engines over one bfloat16 model by the C++ kernels: one caches, one never does."""
    path = tmp_path_factory.mktemp("prefix") / "wide"
    tiny_checkpoint(path, family="qwen3", head_dim=32, mlp_width=64, window=24)
    fields = {"dtype": "bfloat16", "device": "cpu", "compile": "none"}
    fields |= {"attention": request.param, "operators": request.param}
    schedule, cache = {"chunk": 23}, {"max_tokens": 640, "page_size": PAGE_SIZE}
    with (
        LLM(str(path), schedule=schedule, cache=cache, **fields) as caching,
        LLM(str(path), schedule={"chunk": 64}, cache={**cache, "prefix": "off"}, **fields) as cold,
    ):
        yield caching, cold


@settings(max_examples=12, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 200), st.integers(1, 60), st.integers(1, 9)),
        min_size=1,
        max_size=6,
    )
)
def test_a_hit_gives_the_bits_of_a_miss_in_the_kernels_of_a_processor(
    native: tuple[LLM, LLM], turns: list[tuple[int, int, int, int]]
) -> None:
    caching, cold = native
    texts, seen = [np.empty(0, dtype=np.int64)], []
    for parent, kept, fresh, num_output in turns:
        text = texts[parent % len(texts)][:kept]
        prompt = np.concatenate([text, OTHER[:fresh], FIRST[: max(0, fresh - 40)]])
        params = greedy(num_output, logprobs=VOCAB_SIZE)
        output = add(caching.engine, prompt, params)
        if fresh % 2:
            drain(caching.engine)  # else it runs beside the next one
        seen.append((prompt, params, output))
        texts.append(np.concatenate([prompt, OTHER[:5]]))
    drain(caching.engine)

    for prompt, params, output in seen:
        (expected,) = cold.generate(prompt, params)
        assert output.token_ids == expected.token_ids
        assert np.array_equal(logprobs_of(output), logprobs_of(expected))
