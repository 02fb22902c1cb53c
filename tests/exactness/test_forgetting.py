"""Layers that forget what their window has passed give the logits of those that keep all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput
from tests.engines import PAGE_SIZE, greedy, model_of, pages_used, pool_of, random_prompts
from tests.exactness.test_prefix_cache import poison_unused
from tests.model_zoo.dense import dense_context
from tests.model_zoo.tiny import VOCAB_SIZE, oracle, tiny_checkpoint
from tests.ranks import run_ranks

WINDOW = 24
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "all": {"family": "mistral", "window": WINDOW},
    "five of six": {
        "family": "qwen3",
        "window": WINDOW,
        "num_layers": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
    },
}
NUM_TOKENS = 20
PROMPTS = random_prompts((170, 3, 90, 33))
PARAMS = greedy(NUM_TOKENS, logprobs=VOCAB_SIZE)
NATIVE = [each.name for each in INSTRUCTION_SETS if each.why_not() is None][:1]  # the fastest


def open_forgetful(path: Path, **options: Any) -> LLM:
    cache = {"max_tokens": 2048, "page_size": PAGE_SIZE} | options.pop("cache", {})
    schedule = {"chunk": options.pop("chunk", 17)} | options.pop("schedule", {})
    fields = {"dtype": "float64", "device": "cpu"} | options
    return LLM(str(path), schedule=schedule, cache=cache, **fields)


def logprobs_of(output: RequestOutput) -> np.ndarray:
    """Of every word at every position, ``[T, V]``: the logits but for a constant per row."""
    assert output.error is None
    assert output.logprobs is not None
    return np.array([[value for _, value in sorted(entry.top)] for entry in output.logprobs])


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("forgetting") / "tiny"
    return tiny_checkpoint(path, **CHECKPOINTS[request.param])


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[tuple[list[int], np.ndarray]]:
    """Tokens of transformers, and log-probabilities of one dense forward over all of them."""
    theirs, found = oracle(checkpoint), []
    theirs.generation_config.pad_token_id = 0
    with open_forgetful(checkpoint) as llm, torch.inference_mode():
        decoder = model_of(llm)
        for prompt in PROMPTS:
            ids = torch.from_numpy(prompt)[None]
            how = {"do_sample": False, "max_new_tokens": PARAMS.max_tokens}
            ids = theirs.generate(ids, attention_mask=torch.ones_like(ids), **how)[0]
            hidden_TE = decoder(ids, torch.arange(len(ids)), dense_context(decoder.spec.windows))
            rows = decoder.logits(hidden_TE)[len(prompt) - 1 : -1].log_softmax(-1)
            found.append((ids[len(prompt) :].tolist(), rows.numpy()))
    return found


def assert_equal(
    outputs: Sequence[RequestOutput], expected: Sequence[tuple[list[int], np.ndarray]]
) -> None:
    assert [output.token_ids for output in outputs] == [token_ids for token_ids, _ in expected]
    for output, (_, rows) in zip(outputs, expected, strict=True):
        assert np.abs(logprobs_of(output) - rows).max() < 1e-10


@pytest.mark.parametrize(
    ("chunk", "page_size"), [(1, 16), (17, 4), (64, 16), (300, 4), ("adaptive", 4)]
)
def test_any_chunk_gives_the_logits_of_a_dense_forward(
    checkpoint: Path, expected: list[Any], chunk: int | str, page_size: int
) -> None:
    cache = {"page_size": page_size}
    with open_forgetful(checkpoint, attention="reference", chunk=chunk, cache=cache) as llm:
        cold = llm.generate(PROMPTS, PARAMS)
        warm = llm.generate(PROMPTS[0], PARAMS)

        assert llm.engine.scheduler.ledger.kinds.windows
        assert pages_used(llm.engine) == 0
    assert_equal(cold, expected)
    assert_equal(warm, expected[:1])
    assert warm[0].metrics.num_cached == (len(PROMPTS[0]) - 1) // page_size * page_size


@pytest.mark.parametrize("attention", ["cpu", "flex"])
def test_any_backend_gives_the_logits_of_a_dense_forward(
    checkpoint: Path, expected: list[Any], attention: str
) -> None:
    count = len(PROMPTS) if attention == "cpu" else 1  # eager flex takes milliseconds a call
    with open_forgetful(checkpoint, attention=attention, chunk=120) as llm:
        assert_equal(llm.generate(PROMPTS[:count], PARAMS), expected[:count])


def test_rows_that_are_reported_and_those_of_outputs_without_an_end_are_exact(
    checkpoint: Path, expected: list[Any]
) -> None:
    growing = greedy(None, logprobs=VOCAB_SIZE, ignore_eos=True)
    reporting = greedy(1, prompt_logprobs=0)
    cache, schedule = {"max_tokens": 160}, {"expected_tokens": 4}
    with open_forgetful(checkpoint, cache=cache, schedule=schedule) as llm:
        engine = llm.engine
        reported = llm.generate(PROMPTS[2], reporting)[0].prompt_logprobs
        outputs = [output for p in PROMPTS[1:] for output in engine.add(p, growing)]
        while any(len(output.token_ids) < NUM_TOKENS for output in outputs):
            engine.step()
        num_set_back = sum(output.metrics.num_set_back for output in outputs)
        keeps = engine.scheduler.ledger.kinds.keeps
        engine.abort("cancelled")

    assert reported is not None
    assert len(reported) == len(PROMPTS[2])
    assert num_set_back or not keeps  # where no layer keeps all, nothing runs short
    for output, (token_ids, rows) in zip(outputs, expected[1:], strict=True):
        assert output.token_ids[:NUM_TOKENS] == token_ids
        assert np.abs(logprobs_of(output)[:NUM_TOKENS] - rows).max() < 1e-10


@pytest.mark.parametrize("attention", NATIVE)
def test_the_kernels_of_a_processor_give_the_bits_of_a_full_cache(
    tmp_path: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = CHECKPOINTS["five of six"] | {"head_dim": 32, "mlp_width": 64}
    path = tiny_checkpoint(tmp_path / "wide", **fields)
    options = {"dtype": "bfloat16", "attention": attention, "operators": attention}
    outputs = []
    for chunk, recording in ((50, "auto"), (23, "none")):  # decodes are replayed, or not
        with open_forgetful(path, chunk=chunk, compile=recording, **options) as llm:
            outputs += [llm.generate(PROMPTS, PARAMS), llm.generate(PROMPTS, PARAMS)]
    assert [output.metrics.num_cached for output in outputs[1]] == [160, 0, 80, 32]
    monkeypatch.setattr(PageKinds, "of", classmethod(lambda cls, windows, size: cls(size)))
    with open_forgetful(path, chunk=37, compile="none", **options) as llm:
        assert not pool_of(llm).kinds.windows
        full = llm.generate(PROMPTS, PARAMS)

    for found in outputs:
        assert [o.token_ids for o in found] == [o.token_ids for o in full]
        for ours, theirs in zip(found, full, strict=True):
            assert np.array_equal(logprobs_of(ours), logprobs_of(theirs))


def _serve(path: Path, meshes: list[dict[str, int]]) -> list[list[tuple[list[int], np.ndarray]]]:
    """The outputs of each mesh as this rank sees them."""
    torch.set_num_threads(1)
    found = []
    for mesh in meshes:
        cache = {"max_tokens": 512, "max_tokens_per_group": 112} if "kvp" in mesh else {}
        with open_forgetful(path, chunk=61, cache=cache, mesh=mesh) as llm:
            outputs = llm.generate(PROMPTS[:3], PARAMS) + llm.generate(PROMPTS[:1], PARAMS)
        assert outputs[-1].metrics.num_cached == 160
        found.append([(output.token_ids, logprobs_of(output)) for output in outputs])
    return found


@pytest.mark.parametrize("checkpoint", ["five of six"], indirect=True)
def test_meshes_give_the_logits_of_a_dense_forward(checkpoint: Path, expected: list[Any]) -> None:
    meshes = [{"kvp": 2, "pp": 2}, {"pp": 2, "tp": 2}]
    for found in run_ranks(_serve, 4, checkpoint, meshes, timeout_s=280):
        for mesh, outputs in zip(meshes, found, strict=True):
            wanted = [*expected[:3], expected[0]]
            assert [ids for ids, _ in outputs] == [ids for ids, _ in wanted], mesh
            for (_, ours), (_, theirs) in zip(outputs, wanted, strict=True):
                assert np.abs(ours - theirs).max() < 1e-10, mesh


def test_a_conversation_goes_on_where_its_last_turn_ended(
    checkpoint: Path, expected: list[Any]
) -> None:
    first, (ids, _) = PROMPTS[0], expected[0]
    second = np.concatenate([first, np.array(ids), PROMPTS[1]])
    other = np.concatenate([first[:100], PROMPTS[2]])
    turns = [first, second, other, other, second, first]
    params = greedy(5, logprobs=VOCAB_SIZE)
    with open_forgetful(checkpoint, attention="reference", cache={"prefix": "off"}) as llm:
        cold = [output for turn in turns for output in llm.generate(turn, params)]
    for max_tokens in (2048, 320):  # in the second all but the last turns are evicted
        with open_forgetful(
            checkpoint, attention="reference", cache={"max_tokens": max_tokens}
        ) as llm:
            poison_unused(llm)
            llm.generate(first, greedy(len(ids)))
            warm = [output for turn in turns for output in llm.generate(turn, params)]
            found = [output.metrics.num_cached for output in warm]

        assert [output.token_ids for output in warm] == [output.token_ids for output in cold]
        for ours, theirs in zip(warm, cold, strict=True):
            assert np.abs(logprobs_of(ours) - logprobs_of(theirs)).max() < 1e-10
        if max_tokens == 2048:
            assert found == [160, 176, 0, 176, 192, 160]
