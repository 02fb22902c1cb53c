"""The offline API: what may be given, what comes back, and what is left behind."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mnemosyne.config import CacheConfig, ScheduleConfig
from mnemosyne.llm import LLM
from mnemosyne.metrics import StepRecord, read_steps
from mnemosyne.model_zoo.haystack import cycle, haystack, text_of
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import SamplingParams
from mnemosyne.schedule.work import StepWork
from mnemosyne.serve.prompts import PromptIds
from tests.engines import (
    WrappedExecutor,
    greedy,
    model_of,
    open_tiny,
    pages_used,
    pool_of,
    random_prompts,
)
from tests.model_zoo.tiny import tiny_checkpoint

DAYS, PLANETS = cycle("days", 6), cycle("planets", 6)
PROMPTS = random_prompts((5, 30, 12))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llm") / "tiny")


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_needle(tmp_path_factory.mktemp("llm") / "needle")


@pytest.fixture(scope="module")
def reciter(needle: Path) -> Iterator[LLM]:
    """The needle model, which answers texts."""
    with LLM(
        str(needle), dtype="float32", schedule={"chunk": 64}, cache={"max_tokens": "4K"}
    ) as llm:
        yield llm


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint) as llm:
        yield llm


def test_texts_lists_and_arrays_are_prompts_and_answers_come_in_their_order(reciter: LLM) -> None:
    prompts = [
        haystack(200).prompt_ids,
        text_of(DAYS.prompt_ids),
        DAYS.prompt_ids.tolist(),
        PLANETS.prompt_ids.astype(np.int32),
        tuple(PLANETS.prompt_ids.tolist()),
    ]

    outputs = reciter.generate(prompts, greedy(6))

    answers = [haystack(200).answer_ids[:6], *[DAYS.answer_ids] * 2, *[PLANETS.answer_ids] * 2]
    assert [output.token_ids for output in outputs] == [answer.tolist() for answer in answers]
    assert [output.text.split() for output in outputs] == [text_of(a).split() for a in answers]
    for output, ids in zip(
        outputs[1:], [DAYS.prompt_ids] * 2 + [PLANETS.prompt_ids] * 2, strict=True
    ):
        np.testing.assert_array_equal(output.prompt_token_ids, ids)


@pytest.mark.parametrize(
    "prompt",
    [text_of(DAYS.prompt_ids), DAYS.prompt_ids.tolist(), DAYS.prompt_ids],
    ids=["text", "list", "array"],
)
def test_a_single_prompt_counts_as_a_list_of_one(reciter: LLM, prompt: object) -> None:
    (output,) = reciter.generate(prompt, greedy(6))

    assert output.token_ids == DAYS.answer_ids.tolist()


def test_tensors_and_iterators_hold_prompts(llm: LLM) -> None:
    expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(3))]
    tensors = [torch.from_numpy(prompt) for prompt in PROMPTS]

    assert llm.generate(tensors[0], greedy(3))[0].token_ids == expected[0]
    assert [o.token_ids for o in llm.generate(iter(tensors), greedy(3))] == expected


@pytest.mark.parametrize("prompts", [None, 5, 1.5])
def test_what_holds_no_prompts_is_refused(llm: LLM, prompts: object) -> None:
    with pytest.raises(ValueError, match=r"prompts must be texts or lists of token ids, got .*; w"):
        llm.generate(prompts, greedy(3))


def test_rows_of_a_matrix_are_prompts(llm: LLM) -> None:
    rows = np.stack(random_prompts((8, 8)))

    outputs = llm.generate(rows, greedy(3))

    assert [o.token_ids for o in outputs] == [llm.generate(r, greedy(3))[0].token_ids for r in rows]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], greedy(3)) == []
    assert list(llm.stream([])) == []


def test_each_prompt_may_have_its_own_params(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, [greedy(n) for n in (3, 1, 5)])

    assert [len(output.token_ids) for output in outputs] == [3, 1, 5]


def test_without_params_the_defaults_apply(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0])

    assert len(output.token_ids) == SamplingParams().max_tokens


@pytest.mark.parametrize("num_params", [0, 2, 4])
def test_params_and_prompts_of_different_number_are_refused(llm: LLM, num_params: int) -> None:
    with pytest.raises(ValueError, match=rf"one per prompt, got {num_params} for 3 prompts; pass"):
        llm.generate(PROMPTS, [greedy(2)] * num_params)

    assert not llm.engine.has_work


def test_a_stream_brings_what_generate_brings(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS, greedy(5))

    pieces = list(llm.stream(PROMPTS, greedy(5)))

    for index, output in enumerate(outputs):
        own = [piece for i, piece in pieces if i == index]
        assert [t for piece in own for t in piece.token_ids] == output.token_ids
        assert own[-1].finish_reason == "length"
    assert {index for index, _ in pieces} == {0, 1, 2}


def test_a_stream_says_which_prompt_was_refused(llm: LLM) -> None:
    prompts = [PROMPTS[0], [], PROMPTS[1], [10**6]]

    pieces = list(llm.stream(prompts, greedy(2)))

    refused = {index: piece for index, piece in pieces if piece.error is not None}
    assert sorted(refused) == [1, 3]
    assert {piece.finish_reason for piece in refused.values()} == {"error"}
    assert "must hold at least one token" in refused[1].error
    assert "got 1000000 at index 0" in refused[3].error
    assert {index for index, piece in pieces if piece.finish_reason == "length"} == {0, 2}


@pytest.mark.parametrize("num_pieces", [1, 4, 9])
def test_closing_a_stream_early_cancels_what_still_runs(llm: LLM, num_pieces: int) -> None:
    expected = llm.generate(PROMPTS, greedy(5))
    pieces = llm.stream([[], *PROMPTS], greedy(5))
    for _ in range(num_pieces):
        next(pieces)

    pieces.close()

    assert not llm.engine.has_work
    assert pages_used(llm.engine) == 0
    assert [o.token_ids for o in llm.generate(PROMPTS, greedy(5))] == [
        o.token_ids for o in expected
    ]


def test_leaving_the_loop_over_a_stream_cancels_what_still_runs(llm: LLM) -> None:
    for _ in llm.stream(PROMPTS, greedy(5)):
        break

    assert not llm.engine.has_work


def test_new_prompts_while_a_stream_is_open_are_refused(llm: LLM) -> None:
    pieces = llm.stream(PROMPTS, greedy(5))
    next(pieces)

    said = r"must have an engine that nobody uses, got one that LLM\.stream uses; exhaust or close"
    with pytest.raises(ValueError, match=rf"LLM\.generate {said}"):
        llm.generate(PROMPTS, greedy(5))
    with pytest.raises(ValueError, match=rf"LLM\.stream {said}"):
        next(llm.stream(PROMPTS, greedy(5)))

    assert sum(piece.finish_reason == "length" for _, piece in pieces) == 3


def test_samples_of_one_prompt_come_together(llm: LLM) -> None:
    params = SamplingParams(max_tokens=6, temperature=1.0, seed=3, n=3)

    first, second = llm.generate(PROMPTS[:2], params)
    pieces = list(llm.stream(PROMPTS[0], params))

    assert first.samples[0] is first
    assert [len(output.samples) for output in (first, second)] == [3, 3]
    assert len({tuple(sample.token_ids) for sample in first.samples}) == 3
    assert {index for index, _ in pieces} == {0}
    assert len({piece.request_id for _, piece in pieces}) == 3


def test_closing_releases_the_cache_and_the_model(checkpoint: Path) -> None:
    with open_tiny(checkpoint) as llm:
        llm.generate(PROMPTS, greedy(3))
        alive = [weakref.ref(part) for part in (pool_of(llm), model_of(llm), llm.engine)]
        gc.disable()

    try:
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_closed_llm_refuses_prompts(checkpoint: Path) -> None:
    llm = open_tiny(checkpoint)
    pieces = llm.stream([[1], [2]], greedy(5))
    next(pieces)
    llm.close()
    llm.close()

    with pytest.raises(ValueError, match="LLM must be open, got one that was closed"):
        llm.generate(PROMPTS, greedy(3))
    with pytest.raises(ValueError, match="LLM must be open"):
        _ = llm.tokenizer
    assert len(list(pieces)) == 1  # what the last step had brought


def test_an_interruption_while_prompts_are_added_leaves_none_behind(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = llm.engine.add

    def interrupted_add(prompt: PromptIds, params: SamplingParams) -> object:
        if np.array_equal(prompt.ids, PROMPTS[2]):
            raise KeyboardInterrupt
        return add(prompt, params)

    monkeypatch.setattr(llm.engine, "add", interrupted_add)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, greedy(3))

    assert not llm.engine.has_work


def test_a_failure_in_the_middle_reaches_the_caller(llm: LLM) -> None:
    def fail(plan: object) -> None:
        raise RuntimeError("the device is gone")

    WrappedExecutor(llm.engine, before=fail)

    with pytest.raises(RuntimeError, match="the device is gone"):
        llm.generate(PROMPTS, greedy(3))

    assert not llm.engine.has_work


def test_configs_may_be_dataclasses_or_dicts(checkpoint: Path) -> None:
    expected = None
    for schedule, cache in (
        (ScheduleConfig(chunk=5), CacheConfig(max_tokens="1K", page_size=16)),
        ({"chunk": 5}, {"max_tokens": 1024, "page_size": 16}),
    ):
        with LLM(str(checkpoint), dtype="float64", schedule=schedule, cache=cache) as llm:
            output = llm.generate(PROMPTS[1], greedy(3))[0]
            assert llm.engine.scheduler.ledger.num_pages == 64
            assert llm.config.schedule == ScheduleConfig(chunk=5)
        assert output.metrics.chunks == [5] * 6
        assert expected in (None, output.token_ids)
        expected = output.token_ids


@pytest.mark.parametrize("name", ["schedule", "cache", "mesh", "metrics"])
def test_an_unknown_key_of_a_dict_is_named(checkpoint: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must have keys among .*, got 'shunk'; d"):
        LLM(str(checkpoint), **{name: {"shunk": 5}})


def test_steps_are_written_where_metrics_path_says(checkpoint: Path, tmp_path: Path) -> None:
    path, records = tmp_path / "steps.jsonl", []
    with open_tiny(checkpoint, metrics={"path": path}, on_step=records.append) as llm:
        llm.generate(PROMPTS, greedy(5))
        num_written = len(read_steps(path))

    assert num_written == len(records) > 5
    assert read_steps(path) == records
    assert all(isinstance(record, StepRecord) for record in records)


@pytest.mark.parametrize("name", ["path", "trace"])
def test_a_metrics_file_that_cannot_be_written_is_refused_before_the_work(
    name: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^metrics\.{name} must be a file .*; name one in"):
        open_tiny(checkpoint, metrics={name: tmp_path / "nowhere" / "file"})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_loses_records_and_no_request(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records: list[StepRecord] = []
    with open_tiny(checkpoint, metrics={"path": "/dev/full"}, on_step=records.append) as llm:
        outputs = llm.generate(PROMPTS, greedy(5))

    assert [output.finish_reason for output in outputs] == ["length"] * 3
    assert len(records) > 5
    assert [record.message for record in caplog.records] == [
        "no step records from here on: /dev/full: No space left on device"
    ]


def test_a_callback_that_raises_loses_no_step_record_of_the_file(
    checkpoint: Path, tmp_path: Path
) -> None:
    def fail(record: StepRecord) -> None:
        raise RuntimeError("a callback of the user")

    path = tmp_path / "steps.jsonl"
    with open_tiny(checkpoint, metrics={"path": path}, on_step=fail) as llm:
        assert llm.generate(PROMPTS[0], greedy(5))[0].finish_reason == "length"

    assert len(read_steps(path)) >= 5


def test_a_trace_that_cannot_be_written_at_the_end_is_logged(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "there" / "trace.json"
    path.parent.mkdir()
    with open_tiny(checkpoint, metrics={"trace": path}) as llm:
        (output,) = llm.generate(PROMPTS[0], greedy(2))
        path.unlink()
        path.parent.rmdir()

    assert output.finish_reason == "length"
    assert [record.message for record in caplog.records] == [
        f"no trace: {path} cannot be written (No such file or directory)"
    ]


def test_a_progress_bar_is_shown_on_a_terminal_and_changes_nothing(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate(PROMPTS, greedy(5))
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes rich take any file for a terminal
    capsys.readouterr()

    outputs = llm.generate([*PROMPTS, []], greedy(5), progress=True)

    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    num_tokens = sum(map(len, PROMPTS))
    assert [o.token_ids for o in outputs[:3]] == [o.token_ids for o in expected]
    assert outputs[3].finish_reason == "error"
    assert f"{num_tokens} of {num_tokens} tokens" in shown
    assert "3 of 3 requests" in shown


def test_no_bar_is_drawn_where_standard_error_is_no_terminal(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    capsys.readouterr()

    llm.generate(PROMPTS, greedy(5), progress=True)

    assert capsys.readouterr() == ("", "")


def test_reading_weights_reports_bytes(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    with LLM(
        str(checkpoint),
        schedule={"chunk": 8},
        cache={"max_tokens": 256},
        progress=lambda done, total: seen.append((done, total)),
    ):
        pass

    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]}


def test_priority_and_deadline_of_a_prompt_decide_who_comes_first(checkpoint: Path) -> None:
    urgent = [
        SamplingParams(max_tokens=2, deadline=1e-9),
        SamplingParams(max_tokens=2, deadline=1e6),
        SamplingParams(max_tokens=2, priority=-1),
    ]
    firsts: list[int] = []
    with open_tiny(checkpoint, policy="edf", max_sequences=1) as llm:
        for index, piece in llm.stream(PROMPTS, urgent):
            if piece.finish_reason is not None:
                firsts.append(index)
        outputs = llm.generate(PROMPTS, urgent)

    assert firsts == [2, 0, 1]
    assert [output.metrics.missed_deadline for output in outputs[:2]] == [True, False]
    assert [output.metrics.deadline_s for output in outputs] == [1e-9, 1e6, 1.0]


def test_metrics_say_how_long_a_request_waited_and_where_its_cache_is(llm: LLM) -> None:
    output = llm.generate(PROMPTS[1], greedy(3))[0]

    assert output.metrics.num_shards == 1
    assert 0 <= output.metrics.queued_s <= output.metrics.ttft_s


def test_slack_and_missed_deadlines_are_in_the_step_records(checkpoint: Path) -> None:
    records: list[StepRecord] = []
    with open_tiny(checkpoint, on_step=records.append) as llm:
        llm.generate(PROMPTS[1], greedy(3, deadline=1e-9))
        llm.clear_cache()
        llm.generate(PROMPTS[1], greedy(3, deadline=1e6))

    assert all(len(record.slack_s) == len(record.chunks) for record in records)
    assert [record.num_missed for record in records] == [0] * 4 + [1] + [0] * 9
    slacks = [slack for record in records for slack in record.slack_s]
    assert max(slacks[:5]) < 0 < 9e5 < min(slacks[5:])


class OneMillisecond:
    """A user's own predictor: one method."""

    def predict(self, work: StepWork) -> float:
        return 1e-3 * (work.num_tokens > 0)


def test_a_predictor_of_ones_own_needs_one_method(checkpoint: Path) -> None:
    records: list[StepRecord] = []
    with open_tiny(
        checkpoint, chunk="adaptive", predictor=OneMillisecond(), on_step=records.append
    ) as llm:
        llm.generate(PROMPTS, greedy(3))
        error = llm.engine.prediction_error()

    assert {record.predicted_s for record in records} == {1e-3}
    errors = [abs(record.predicted_s / record.actual_s - 1) for record in records]
    assert error[50] == pytest.approx(np.median(errors))
