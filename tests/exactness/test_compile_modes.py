"""Compiled or not, the tokens are those of transformers, in float64, with every backend."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.engines import greedy, open_tiny, random_prompts
from tests.model_zoo.tiny import oracle_logits, tiny_checkpoint

# importing the compiler warns of what torch itself still uses
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

PROMPTS = random_prompts((1, 5, 33, 41))
NUM_TOKENS = 12
SLOW = pytest.mark.slow
FAMILIES = [
    "llama",
    pytest.param("qwen3", marks=SLOW),
    pytest.param("qwen2", marks=SLOW),
    pytest.param("mistral", marks=SLOW),
]
BACKENDS = ["cpu", pytest.param("reference", marks=SLOW), pytest.param("flex", marks=SLOW)]


def _assert_greedy(path: Path, prompt: list[int], token_ids: list[int]) -> None:
    """Each token is the likeliest one after those before it."""
    logits_TV = oracle_logits(path, [*prompt, *token_ids])[len(prompt) - 1 : -1]
    assert logits_TV.argmax(-1).tolist() == token_ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", BACKENDS)
def test_tokens_are_those_of_transformers_and_of_the_eager_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, attention: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = tiny_checkpoint(tmp_path / family, family=family)
    with open_tiny(checkpoint, attention=attention) as llm:
        eager = [output.token_ids for output in llm.generate(PROMPTS, greedy(NUM_TOKENS))]

    with open_tiny(checkpoint, attention=attention, compile="step") as llm:
        before = counters["stats"]["unique_graphs"]
        together = [output.token_ids for output in llm.generate(PROMPTS, greedy(NUM_TOKENS))]
        alone = llm.generate(PROMPTS[2], greedy(NUM_TOKENS))[0].token_ids
        graphs = counters["stats"]["unique_graphs"] - before

    assert together == eager
    assert alone == eager[2]
    assert graphs == 0 or attention == "flex", "a step compiled something"
    for prompt, token_ids in zip(PROMPTS, together, strict=True):
        _assert_greedy(checkpoint, prompt.tolist(), token_ids)


@SLOW
def test_the_number_of_threads_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # compiled loops have it built in: another number must not find them on disk
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = tiny_checkpoint(tmp_path / "model")
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        with open_tiny(checkpoint, compile="step") as llm:
            before = counters["stats"]["unique_graphs"]
            llm.generate(PROMPTS, greedy(4))
            assert counters["stats"]["unique_graphs"] == before
