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


def test_a_filled_prompt_takes_one_step_and_teaches_nothing(checkpoint: Path) -> None:
    engine = engine_on(checkpoint, fills=True)
    scheduler = engine._engine.scheduler
    observed: list[float] = []
    scheduler.predictor.predict = lambda work: 50.0
    scheduler.predictor.observe = lambda work, seconds: observed.append(seconds)
    (long, other) = random_prompts([900, 20])
    steps = 0

    def step() -> list[tuple[int, int]]:
        nonlocal steps
        steps += 1
        return Ours.step(engine)

    engine.step = step  # type: ignore[method-assign]
    answers = serve(engine, [request(long, is_filled=True), request(other, after=2)])

    # one that skips, one decode, three chunks of 7 tokens, five decodes of the second request
    assert steps == len(observed) == 10
    assert 50.0 <= observed[0] < 51.0
    assert max(observed[1:]) < 50.0
    assert [len(answer["token_ids"]) for answer in answers] == [6, 6]
    assert scheduler.config.chunk == 7
