"""A step that finds no memory ends its own requests with a sentence; the engine serves on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mnemosyne.llm import LLM
from mnemosyne.schedule.plan import Plan
from tests.engines import (
    add,
    drain,
    greedy,
    open_tiny,
    pages_used,
    random_prompts,
    worker_of,
)
from tests.model_zoo.tiny import tiny_checkpoint

PROMPTS = random_prompts((40, 3, 5))
MESSAGE = "memory must suffice for a step, got one of "


@pytest.fixture
def llm(tmp_path: Path) -> Iterator[LLM]:
    with open_tiny(tiny_checkpoint(tmp_path / "tiny"), chunk=3, max_sequences=2) as llm:
        yield llm


def before(inner: Callable[[Plan], Any], check: Callable[[Plan], None]) -> Callable[[Plan], Any]:
    def forward(plan: Plan) -> Any:
        check(plan)
        return inner(plan)

    return forward


def failures() -> list[BaseException]:
    def allocate() -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    found: list[BaseException] = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
    try:
        allocate()
    except RuntimeError as error:
        found.append(error)
    assert len(found) == 3
    return found


@pytest.mark.parametrize("name", ["copy", "clear"])
def test_pages_that_cannot_be_copied_or_cleared_end_no_step_in_silence(
    name: str, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(20))]
    worker = worker_of(llm)

    def fail(plan: Plan) -> None:
        getattr(worker.pool, name)([], [])

    def run_out(*pages: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(worker.pool, name, run_out)
        patch.setattr(worker, "_apply", before(worker._apply, fail))
        with pytest.raises(MemoryError):
            llm.generate(PROMPTS, greedy(20))

    assert [output.token_ids for output in llm.generate(PROMPTS, greedy(20))] == expected


@pytest.mark.parametrize("failure", failures(), ids=lambda error: type(error).__name__)
def test_the_requests_of_the_step_end_and_those_that_wait_are_served(
    failure: BaseException, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(20))]
    outputs = [add(llm.engine, prompt, greedy(20)) for prompt in PROMPTS]
    ended: list[int] = []

    def fail(plan: Plan) -> None:
        if len(plan.chunks) == 2 and not ended:
            ended.extend(chunk.request_id for chunk in plan.chunks)
            raise failure

    worker = worker_of(llm)
    monkeypatch.setattr(worker, "_forward", before(worker._forward, fail))
    drain(llm.engine)

    assert len(ended) == 2
    for output, token_ids in zip(outputs, expected, strict=True):
        if output.request_id in ended:
            assert output.finish_reason == "error"
            assert (output.error or "").startswith(MESSAGE)
        else:
            assert output.token_ids == token_ids
    assert pages_used(llm.engine) == 0
    assert [output.token_ids for output in llm.generate(PROMPTS, greedy(20))] == expected


def test_another_failure_of_a_step_is_not_taken_for_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(worker_of(llm), "_forward", fail)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        llm.generate(PROMPTS[1], greedy(1))


def test_a_real_limit_of_memory_ends_the_prompt_that_exceeds_it(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "tiny")
    code = f"""
import resource
from mnemosyne import LLM, SamplingParams

params = SamplingParams(max_tokens=2, temperature=0.0)
engine = {{"device": "cpu", "attention": "reference", "dtype": "float64"}}
with LLM({str(path)!r}, schedule={{"chunk": 1000}}, cache={{"max_tokens": 2048}}, **engine) as llm:
    llm.generate([[1] * 8], params)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + (12 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    (large,), (small,) = llm.generate([[1] * 1000], params), llm.generate([[1] * 8], params)
    print(large.finish_reason, large.error)
    print(small.finish_reason, small.error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    large, small = done.stdout.splitlines()
    assert large.startswith("error memory must suffice for a step, got one of 1000 tokens")
    assert small == "length None"
