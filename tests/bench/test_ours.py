"""The engine as the bench runs it: its own tokens, and prefills that are skipped, not learned."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnemosyne.bench.peers.main import serve
from mnemosyne.bench.peers.ours import Ours
from mnemosyne.config import CacheConfig, EngineConfig, ScheduleConfig
from mnemosyne.schedule.plan import Plan
from tests.engines import greedy, open_tiny, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


def engine_on(path: Path, *, fills: bool, chunk: int | str = 7) -> Ours:
    config = EngineConfig(
        model=str(path),
        dtype="float64",
        device="cpu",
        schedule=ScheduleConfig(chunk=chunk, saved_fit=False),
        cache=CacheConfig(max_tokens=2048, page_size=16),
    )
    return Ours({"threads": 1, "fills": fills, "engine": asdict(config)})


def request(ids: np.ndarray, *, is_filled: bool = False, after: int = 0) -> dict[str, Any]:
    fields = {"is_filled": is_filled, "after": after}
    return {"ids": ids.tolist(), "max_tokens": 6, **fields}


def test_it_gives_the_tokens_of_the_library(checkpoint: Path) -> None:
    prompts = random_prompts([30, 12])
    with open_tiny(checkpoint) as llm:
        expected = [
            output.token_ids for output in llm.generate(prompts, greedy(6, ignore_eos=True))
        ]

    engine = engine_on(checkpoint, fills=False)
    runs = [serve(engine, [request(prompt) for prompt in prompts]) for _ in range(2)]

    assert [[answer["token_ids"] for answer in run] for run in runs] == [expected] * 2


def test_step_times_are_measured_before_the_first_request(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mnemosyne")

    engine = engine_on(checkpoint, fills=False, chunk="adaptive")

    assert "step times fitted" in caplog.text
    serve(engine, [request(prompt) for prompt in random_prompts([30, 12])])
    assert caplog.text.count("step times fitted") == 1


def test_of_a_filled_prompt_the_last_token_alone_is_computed(checkpoint: Path) -> None:
    engine = engine_on(checkpoint, fills=True)
    plans: list[Plan] = []
    submit = engine.executor.submit
    engine.executor.submit = lambda plan: (plans.append(plan), submit(plan))[1]  # type: ignore[method-assign]
    (long, other) = random_prompts([900, 20])

    answers = serve(engine, [request(long, is_filled=True), request(other, after=2)])

    # one token of the filled prompt, one decode, three chunks of 7 tokens, five last decodes
    sizes = [[chunk.num_tokens for chunk in plan.chunks] for plan in plans]
    assert sizes == [[1], [1], [1, 7], [1, 7], [1, 6], [1, 1], *[[1]] * 4]
    assert (plans[0].chunks[0].start, plans[0].chunks[0].is_decode) == (899, False)
    assert [len(answer["token_ids"]) for answer in answers] == [6, 6]


def test_equal_prompts_are_computed_each_for_itself(checkpoint: Path) -> None:
    engine = engine_on(checkpoint, fills=False, chunk=64)
    plans: list[Plan] = []
    submit = engine.executor.submit
    engine.executor.submit = lambda plan: (plans.append(plan), submit(plan))[1]  # type: ignore[method-assign]
    (prompt,) = random_prompts([50])

    serve(engine, [request(prompt), request(prompt)])

    starts = [chunk.start for plan in plans for chunk in plan.chunks if not chunk.is_decode]
    assert starts.count(0) == 2
