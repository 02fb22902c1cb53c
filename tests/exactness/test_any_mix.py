"""Whatever comes, goes and waits in between, who finishes has the tokens of a lone run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput, SamplingParams
from tests.engines import PAGE_SIZE, open_tiny, pages_used, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint

PROMPTS = random_prompts((1, 3, 16, 17, 40, 75, 120))
PARAMS = [
    SamplingParams(max_tokens=9, temperature=0.0),
    SamplingParams(max_tokens=1, temperature=0.0),
    SamplingParams(max_tokens=14, temperature=1.1, top_p=0.9, seed=3, repetition_penalty=1.2),
    SamplingParams(max_tokens=6, temperature=0.7, seed=4, top_k=8, stop_token_ids=[5, 6, 7]),
]
NUM_PAGES = 14  # the largest request takes 9
CHUNKS = (4, 7, 16, 64, "adaptive")


@dataclass(frozen=True)
class Visit:
    """One request: what it asks, when it comes, and how long it stays if it does not wait."""

    prompt: int
    params: int
    at_step: int
    leaves_after: int | None


VISITS = st.builds(
    Visit,
    prompt=st.integers(0, len(PROMPTS) - 1),
    params=st.integers(0, len(PARAMS) - 1),
    at_step=st.integers(0, 25),
    leaves_after=st.one_of(st.none(), st.none(), st.integers(0, 30)),
)


@dataclass
class Hotel:
    """An engine that steps while requests come and go."""

    llm: LLM
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    def serve(self, visits: list[Visit]) -> list[RequestOutput]:
        engine, step = self.llm.engine, 0
        while step < 30 or engine.has_work:
            for index, visit in enumerate(visits):
                if visit.at_step == step:
                    (output,) = engine.add(PROMPTS[visit.prompt], PARAMS[visit.params])
                    self.outputs[index] = output
                if visit.leaves_after is not None and visit.at_step + visit.leaves_after == step:
                    engine.cancel(self.outputs[index].request_id)
            engine.step()
            step += 1
            assert step < 3000, "it does not come to an end"
        return [self.outputs[index] for index in range(len(visits))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("mix") / "tiny", family="qwen3", window=32)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[tuple[int, int], RequestOutput]:
    """Every prompt with every parameters, by itself in one chunk."""
    with open_tiny(checkpoint, chunk=128) as llm:
        return {
            (i, j): llm.generate(prompt, params)[0]
            for i, prompt in enumerate(PROMPTS)
            for j, params in enumerate(PARAMS)
        }


@pytest.fixture(scope="module", params=CHUNKS, ids=str)
def llm(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A cache too small for all, and few places."""
    with open_tiny(
        checkpoint,
        chunk=request.param,
        max_tokens=NUM_PAGES * PAGE_SIZE,
        max_sequences=5,
        min_chunk=8,
        target_tbt=0.004,
        long_tokens=60,
    ) as llm:
        yield llm


@settings(max_examples=20)
@given(visits=st.lists(VISITS, min_size=1, max_size=12))
def test_finished_requests_have_the_tokens_of_their_lone_runs(
    llm: LLM, alone: dict[tuple[int, int], RequestOutput], visits: list[Visit]
) -> None:
    outputs = Hotel(llm).serve(visits)

    for visit, output in zip(visits, outputs, strict=True):
        expected = alone[visit.prompt, visit.params]
        if output.finish_reason == "cancelled":
            assert visit.leaves_after is not None
            assert output.token_ids == expected.token_ids[: len(output.token_ids)]
        else:
            assert output.token_ids == expected.token_ids
            assert output.finish_reason == expected.finish_reason
            num_computed = sum(output.metrics.chunks)
            assert num_computed + output.metrics.num_cached == len(PROMPTS[visit.prompt])
    assert pages_used(llm.engine) == 0
    assert not llm.engine.has_work
