"""The loop: pieces, times, cancelling, waiting, and what an interrupted step leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from mnemosyne.llm import LLM
from mnemosyne.metrics import StepRecord
from mnemosyne.model_zoo.haystack import cycle, haystack
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import Piece, RequestOutput
from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.work import StepWork
from mnemosyne.serve.stream import TextStream
from tests.engines import (
    PAGE_SIZE,
    WrappedExecutor,
    add,
    drain,
    greedy,
    open_tiny,
    pages_used,
    random_prompts,
)
from tests.model_zoo.tiny import tiny_checkpoint

PROMPTS = random_prompts((40, 9, 23, 1, 64, 17))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("engine") / "tiny")


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[list[int]]:
    """Tokens of each prompt when nothing else runs."""
    with open_tiny(checkpoint, chunk=64) as llm:
        return [llm.generate(prompt, greedy(12))[0].token_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_needle(tmp_path_factory.mktemp("engine") / "needle")


def test_pieces_join_to_the_output(needle: Path) -> None:
    recitals = [haystack(300, depth=0.3), cycle("days", 9), cycle("planets", 5)]
    with LLM(
        str(needle),
        dtype="float32",
        schedule={"chunk": 64},
        cache={"max_tokens": "4K"},
    ) as llm:
        outputs = [add(llm.engine, r.prompt_ids, greedy(len(r.answer_ids))) for r in recitals]
        pieces = [piece for step in drain(llm.engine) for piece in step]

    for recital, output in zip(recitals, outputs, strict=True):
        own = [piece for piece in pieces if piece.request_id == output.request_id]
        assert [t for piece in own for t in piece.token_ids] == recital.answer_ids.tolist()
        assert output.token_ids == recital.answer_ids.tolist()
        assert "".join(piece.text for piece in own) == output.text
        assert len(output.text.split()) >= 5
        assert [piece.finish_reason is None for piece in own] == [True] * (len(own) - 1) + [False]
        assert own[-1].finish_reason == output.finish_reason


def test_a_prefill_reports_how_far_it_is(llm: LLM) -> None:
    output = add(llm.engine, PROMPTS[0], greedy(2))

    pieces = [piece for step in drain(llm.engine) for piece in step]

    assert [piece.prefilled for piece in pieces] == [7, 14, 21, 28, 35, 40, 40]
    assert {piece.num_prompt_tokens for piece in pieces} == {40}
    assert [len(piece.token_ids) for piece in pieces] == [0, 0, 0, 0, 0, 1, 1]
    assert output.metrics.chunks == [7, 7, 7, 7, 7, 5]


def test_times_of_a_request_are_those_of_its_steps(llm: LLM) -> None:
    engine, now_s = llm.engine, 100.0

    def spend(plan: Plan) -> None:
        nonlocal now_s
        now_s += 0.5

    engine.clock = lambda: now_s
    WrappedExecutor(engine, after=spend)
    output = add(engine, PROMPTS[1], greedy(4))
    now_s += 3.0  # it waits

    drain(engine)

    assert output.metrics.arrival_s == 100.0
    assert output.metrics.ttft_s == 3.0 + 2 * 0.5
    assert output.metrics.tbt_s == [0.5] * 3
    assert output.metrics.finished_s == 105.5


def test_a_step_record_says_what_the_step_held(checkpoint: Path) -> None:
    records: list[StepRecord] = []
    with open_tiny(checkpoint, on_step=records.append) as llm:
        first = add(llm.engine, PROMPTS[3], greedy(3))
        llm.engine.step()
        second = add(llm.engine, PROMPTS[1], greedy(1))
        drain(llm.engine)

    assert [record.index for record in records] == [0, 1, 2]
    assert [record.num_decodes for record in records] == [0, 1, 1]
    assert [record.chunks for record in records] == [
        ((first.request_id, 0, 1),),
        ((second.request_id, 0, 7),),
        ((second.request_id, 7, 2),),
    ]
    assert [record.pages_used for record in records] == [1, 2, 0]
    assert all(record.actual_s > 0 for record in records)


def is_waiting(output: RequestOutput) -> bool:
    return not output.metrics.chunks


def is_mid_prefill(output: RequestOutput) -> bool:
    return 0 < sum(output.metrics.chunks) < len(output.prompt_token_ids)


def is_decoding(output: RequestOutput) -> bool:
    return len(output.token_ids) == 3


@pytest.mark.parametrize("is_moment", [is_waiting, is_mid_prefill, is_decoding])
@pytest.mark.parametrize("cancelled", range(3))
def test_a_cancelled_request_gives_its_pages_back_and_spares_the_others(
    checkpoint: Path,
    alone: list[list[int]],
    is_moment: Callable[[RequestOutput], bool],
    cancelled: int,
) -> None:
    with open_tiny(checkpoint) as llm:
        engine = llm.engine
        outputs = [add(engine, prompt, greedy(12)) for prompt in PROMPTS[:3]]
        while not is_moment(outputs[cancelled]):
            engine.step()
        num_tokens = len(outputs[cancelled].token_ids)

        engine.cancel(outputs[cancelled].request_id)
        pieces = [piece for step in drain(engine) for piece in step]
        num_used = pages_used(engine)

    assert outputs[cancelled].finish_reason == "cancelled"
    assert len(outputs[cancelled].token_ids) == num_tokens
    assert outputs[cancelled].request_id not in {piece.request_id for piece in pieces}
    assert num_used == 0
    for index, output in enumerate(outputs):
        if index != cancelled:
            assert output.token_ids == alone[index]


def test_pages_of_a_cancelled_request_are_back_at_the_next_step(checkpoint: Path) -> None:
    # room for one of the two at a time
    with open_tiny(checkpoint, max_tokens=5 * PAGE_SIZE) as llm:
        first = add(llm.engine, PROMPTS[4], greedy(12))
        second = add(llm.engine, PROMPTS[4], greedy(12))
        llm.engine.step()
        assert is_waiting(second)

        llm.engine.cancel(first.request_id)
        pieces = llm.engine.step()

    assert [piece.request_id for piece in pieces] == [second.request_id]


def test_cancelling_what_is_done_or_unknown_does_nothing(llm: LLM) -> None:
    output = llm.generate(PROMPTS[0], greedy(2))[0]

    llm.engine.cancel(output.request_id)
    llm.engine.cancel(12345)

    assert output.finish_reason == "length"
    assert not llm.engine.has_work


def test_everything_finishes_in_order_in_a_cache_too_small_for_all(
    checkpoint: Path, alone: list[list[int]]
) -> None:
    records: list[StepRecord] = []
    order = [0, 4, 2, 5, 1, 3] * 2
    with open_tiny(
        checkpoint, max_tokens=6 * PAGE_SIZE, policy="fcfs", on_step=records.append
    ) as llm:
        outputs = llm.generate([PROMPTS[i] for i in order], greedy(12))

    starts = [request_id for r in records for request_id, start, _ in r.chunks if start == 0]
    assert starts == [output.request_id for output in outputs]
    assert [output.token_ids for output in outputs] == [alone[i] for i in order]
    assert max(record.num_waiting for record in records) >= 9
    assert max(record.pages_used for record in records) <= 6
    assert records[-1].pages_used == 0


def test_no_more_sequences_run_than_max_sequences(checkpoint: Path, alone: list[list[int]]) -> None:
    records: list[StepRecord] = []
    with open_tiny(checkpoint, chunk=64, max_sequences=2, on_step=records.append) as llm:
        outputs = llm.generate(PROMPTS, greedy(12))

    assert max(record.num_running for record in records) == 2
    assert max(record.num_decodes for record in records) == 2
    assert [output.token_ids for output in outputs] == alone


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("at_step", [0, 3, 8, 15])
def test_after_a_step_was_interrupted_new_requests_are_served_right(
    llm: LLM, alone: list[list[int]], moment: str, at_step: int
) -> None:
    engine, num_steps = llm.engine, 0

    def interrupt(plan: Plan) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == at_step + 1:
            raise KeyboardInterrupt

    WrappedExecutor(engine, **{moment: interrupt})
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(12))
    num_used = pages_used(engine)

    outputs = llm.generate(PROMPTS, greedy(12))

    assert num_used == pages_used(engine) == 0
    assert [output.token_ids for output in outputs] == alone


def test_requests_of_an_interrupted_step_end_as_cancelled(llm: LLM) -> None:
    engine, clock = llm.engine, llm.engine.clock

    def interrupt(plan: Plan) -> None:
        if plan.index == 4:
            raise KeyboardInterrupt

    WrappedExecutor(engine, after=interrupt)
    outputs = [add(engine, prompt, greedy(12)) for prompt in PROMPTS]

    with pytest.raises(KeyboardInterrupt):
        drain(engine)
    engine.abort("cancelled")

    assert {output.finish_reason for output in outputs} == {"cancelled"}
    assert all(output.metrics.finished_s <= clock() for output in outputs)
    assert not engine.has_work
    assert engine.step() == []


class InterruptingPredictor:
    """A predictor that raises at its n-th call: Ctrl-C while a step is planned."""

    def __init__(self, at_call: int | None) -> None:
        self.num_calls = 0
        self.at_call = at_call

    def predict(self, work: StepWork) -> float:
        self.num_calls += 1
        if self.num_calls == self.at_call:
            raise KeyboardInterrupt
        return 1e-3 * work.num_tokens

    def observe(self, work: StepWork, seconds: float) -> None:
        pass


@pytest.mark.parametrize("at_call", [1, 2, 5, 12, 40, 41, 42, 43, 90])
def test_an_interruption_in_the_middle_of_planning_loses_no_page(
    llm: LLM, alone: list[list[int]], at_call: int
) -> None:
    scheduler, predictor = llm.engine.scheduler, InterruptingPredictor(at_call)
    scheduler.predictor = scheduler._prefill.predictor = predictor

    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(12))
    num_used = pages_used(llm.engine)
    outputs = llm.generate(PROMPTS, greedy(12))

    assert num_used == pages_used(llm.engine) == 0
    assert [output.token_ids for output in outputs] == alone


def test_a_failed_executor_leaves_an_engine_that_serves(llm: LLM, alone: list[list[int]]) -> None:
    def fail(plan: Plan) -> None:
        if plan.index == 2:
            raise RuntimeError("out of memory")

    WrappedExecutor(llm.engine, before=fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        llm.generate(PROMPTS, greedy(12))

    assert llm.generate(PROMPTS[2], greedy(12))[0].token_ids == alone[2]
    assert pages_used(llm.engine) == 0


def test_executors_forget_requests_even_when_the_step_that_says_so_is_interrupted(llm: LLM) -> None:
    num_releasing = 0

    def interrupt(plan: Plan) -> None:
        nonlocal num_releasing
        num_releasing += bool(plan.released)
        if num_releasing == 1:
            raise KeyboardInterrupt

    executor = WrappedExecutor(llm.engine, before=interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(12))
    llm.generate(PROMPTS, greedy(3))

    last = add(llm.engine, PROMPTS[0], greedy(1))
    llm.engine.step()

    assert list(executor.inner.worker._sequences) == [last.request_id]


def test_a_piece_is_yielded_for_every_request_of_a_step(llm: LLM) -> None:
    outputs = [
        add(llm.engine, PROMPTS[i], greedy(3, priority=priority))
        for priority, i in enumerate((3, 1))
    ]

    steps = drain(llm.engine)

    def seen(step: list[Piece]) -> list[tuple[int | None, int, int]]:
        return [(p.request_id, p.prefilled, len(p.token_ids)) for p in step]

    first, second = (output.request_id for output in outputs)
    assert seen(steps[0]) == [(first, 1, 1), (second, 6, 0)]
    assert seen(steps[1]) == [(first, 1, 1), (second, 9, 1)]
    assert seen(steps[2]) == [(first, 1, 1), (second, 9, 1)]


def test_a_prompt_array_may_be_changed_after_it_was_added(llm: LLM, alone: list[list[int]]) -> None:
    prompt = PROMPTS[4].copy()
    output = add(llm.engine, prompt, greedy(12))

    llm.engine.step()
    prompt[:] = 0
    drain(llm.engine)

    assert output.token_ids == alone[4]
    np.testing.assert_array_equal(output.prompt_token_ids, PROMPTS[4])


def test_a_request_whose_text_fails_ends_alone(
    needle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    days, planets = cycle("days", 6), cycle("planets", 6)
    push = TextStream.push

    def push_or_fail(stream: TextStream, token_ids: Sequence[int]) -> str:
        if planets.answer_ids[2] in token_ids:
            raise OverflowError("a token that cannot be decoded")
        return push(stream, token_ids)

    monkeypatch.setattr(TextStream, "push", push_or_fail)
    with LLM(str(needle), schedule={"chunk": 64}, cache={"max_tokens": "4K"}) as llm:
        good, bad = llm.generate([days.prompt_ids, planets.prompt_ids], greedy(6))
        num_used = pages_used(llm.engine)

    assert good.token_ids == days.answer_ids.tolist()
    assert (good.finish_reason, bad.finish_reason) == ("length", "error")
    assert bad.error == "the request failed: OverflowError: a token that cannot be decoded"
    assert num_used == 0
    assert [record.message for record in caplog.records] == ["request 1 failed"]


def test_a_callback_that_raises_is_logged_once_and_ends_nothing(
    llm: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[StepRecord] = []

    def fail(record: StepRecord) -> None:
        called.append(record)
        raise RuntimeError("a callback of the user")

    llm.engine.on_step = fail
    (output,) = llm.generate([PROMPTS[0]], greedy(4))

    assert output.finish_reason == "length"
    assert len(called) == 1
    assert [record.message for record in caplog.records] == [
        "on_step failed and is not called any more; requests go on"
    ]
