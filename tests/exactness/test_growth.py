"""Outputs whose end is not known are those of an undisturbed run, however often pages run out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput, SamplingParams
from tests.engines import PAGE_SIZE, add, pages_used, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint

NUM_REQUESTS = 16
LENGTHS = np.random.default_rng(0).integers(1, 90, NUM_REQUESTS)
PROMPTS = random_prompts([int(length) for length in LENGTHS])
ENDS = 120  # tokens of an output that the test waits for


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("growth") / "tiny", family="qwen3", window=24)


def serve(
    checkpoint: Path, max_tokens: int, params: SamplingParams, *, prefix: str, chunk: int = 16
) -> list[RequestOutput]:
    """Sixteen endless requests at once, each cancelled once it is long enough."""
    with LLM(
        str(checkpoint),
        dtype="float64",
        device="cpu",
        schedule={"chunk": chunk, "expected_tokens": 20},
        cache={"max_tokens": max_tokens, "page_size": PAGE_SIZE, "prefix": prefix},
    ) as llm:
        engine = llm.engine
        outputs = [add(engine, prompt, params) for prompt in PROMPTS]
        while engine.has_work:
            engine.step()
            for output in outputs:
                if output.finish_reason is None and len(output.token_ids) >= ENDS:
                    engine.cancel(output.request_id)
        assert pages_used(engine) == 0
    return outputs


@pytest.mark.parametrize("prefix", ["off", "auto"])
def test_a_cache_of_half_of_it_serves_all_of_them_the_same_tokens(
    checkpoint: Path, prefix: str
) -> None:
    params = SamplingParams(max_tokens=None, temperature=1.0, seed=3, repetition_penalty=1.1)
    num_tokens = int(LENGTHS.sum()) + NUM_REQUESTS * ENDS
    # room for what a lone request may take, so that max_tokens resolves alike
    undisturbed = serve(checkpoint, 2 * num_tokens, params, prefix="off", chunk=64)

    outputs = serve(checkpoint, num_tokens // 2, params, prefix=prefix)

    assert [o.token_ids[:ENDS] for o in outputs] == [o.token_ids[:ENDS] for o in undisturbed]
    assert all(output.finish_reason == "cancelled" for output in outputs)
    counts = [output.metrics.num_set_back for output in outputs]
    assert sum(counts) > 0
    assert max(counts) <= 1 + np.log2(ENDS / 20)
    assert not any(output.metrics.num_set_back for output in undisturbed)
