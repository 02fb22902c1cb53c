"""A predictor of the user's that fails, at any call: requests go on, with the same tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mnemosyne.llm import LLM
from mnemosyne.schedule.work import StepWork
from tests.engines import greedy, open_tiny, random_prompts
from tests.model_zoo.tiny import tiny_checkpoint

PROMPTS = random_prompts((5, 30, 12))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("predictor") / "tiny")


def test_what_never_could_predict_is_refused_before_weights_are_read() -> None:
    with pytest.raises(ValueError, match=r"predictor must have a method predict.*got 3"):
        LLM("no-such-model", predictor=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("predicted", [None, math.nan, -1.0, "1", 1e300])
def test_a_predictor_that_gives_no_time_ends_no_request(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, predicted: object
) -> None:
    class Strange:
        def predict(self, work: StepWork) -> Any:
            return predicted

    with open_tiny(checkpoint) as llm:
        right = llm.generate(PROMPTS, greedy(3))

    with open_tiny(checkpoint, chunk="adaptive", predictor=Strange()) as llm:
        outputs = llm.generate(PROMPTS, greedy(3))

    assert [output.token_ids for output in outputs] == [output.token_ids for output in right]
    assert caplog.text.count("is not asked any more") == 1


@pytest.mark.parametrize("at_call", [1, 30])
@pytest.mark.parametrize("method", ["predict", "observe"])
def test_a_predictor_that_raises_ends_no_request(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, method: str, at_call: int
) -> None:
    class Raising:
        calls = 0

        def predict(self, work: StepWork) -> float:
            self.fail("predict")
            return 1e-3

        def observe(self, work: StepWork, seconds: float) -> None:
            self.fail("observe")

        def fail(self, called: str) -> None:
            self.calls += called == method
            if self.calls == at_call:
                raise RuntimeError("mine")

    with open_tiny(checkpoint, chunk="adaptive", predictor=Raising()) as llm:
        outputs = llm.generate(PROMPTS, greedy(30))

    assert [output.finish_reason for output in outputs] == ["length"] * 3
    assert caplog.text.count("is not asked any more") == 1
