"""``mnemosyne generate`` on the needle model: every way in, every way out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mnemosyne import cli
from mnemosyne.model_zoo.haystack import cycle, text_of
from mnemosyne.process import INTERRUPTED
from mnemosyne.request import Piece, RequestMetrics, RequestOutput
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.progress import Bars
from tests.caches import empty_cache

ENGINE = ("dtype=float32", "schedule=fixed", "cache.max_tokens=4K")

DAYS, MONTHS = cycle("days", 3), cycle("months", 3)


@pytest.fixture(scope="module", autouse=True)
def needle_home(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Where the needle model is written, once for all tests here."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = empty_cache(tmp_path_factory.mktemp("cache"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        yield


def generate(*words: str) -> int:
    return cli.main(["generate", "model=needle", *ENGINE, "max_tokens=3", *words])


def test_a_prompt_is_answered_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    status = generate(f"prompt={text_of(DAYS.prompt_ids)}")

    printed = capsys.readouterr()
    assert status == cli.OK
    assert printed.out.split() == text_of(DAYS.answer_ids).split()
    assert "1 of 1 prompts finished: 3 tokens in" in printed.err


@pytest.mark.parametrize("stream", ["true", "false"])
def test_streamed_and_whole_text_are_the_same(
    stream: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(f"prompt={text_of(DAYS.prompt_ids)}", f"stream={stream}")

    assert capsys.readouterr().out.split() == text_of(DAYS.answer_ids).split()


def test_several_prompts_are_labelled_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(text_of(MONTHS.prompt_ids) + "\n")

    status = generate(
        f"prompts=[{text_of(DAYS.prompt_ids)}]",
        f"prompt_file={file}",
        f"token_ids={DAYS.prompt_ids.tolist()}".replace(" ", ""),
    )

    days, months = (" ".join(text_of(r.answer_ids).split()) for r in (DAYS, MONTHS))
    assert status == cli.OK
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        f"[1] {days}",
        f"[2] {months}",
        f"[3] {days}",
    ]


def test_standard_input_is_a_prompt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text_of(DAYS.prompt_ids) + "\n"))

    generate("-")

    assert capsys.readouterr().out.split() == text_of(DAYS.answer_ids).split()


def test_a_refused_prompt_is_named_and_the_others_are_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"

    status = generate(
        f"prompts=[{text_of(DAYS.prompt_ids)}]", "token_ids=[[],[1,99999999]]", f"output={output}"
    )

    printed = capsys.readouterr()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert status == cli.FAILED
    assert printed.out.split() == ["[1]", *text_of(DAYS.answer_ids).split()]
    assert "error: prompt 2: prompt must hold at least one token" in printed.err
    assert "error: prompt 3: prompt ids must lie in" in printed.err
    assert [line["prompt"] for line in lines] == [1, 2, 3]
    assert [line["finish_reason"] for line in lines] == ["length", "error", "error"]
    assert lines[0]["token_ids"] == DAYS.answer_ids.tolist()
    assert lines[0]["metrics"]["ttft_s"] > 0


def test_without_max_tokens_an_answer_takes_what_the_cache_holds(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"

    status = generate(
        f"prompt={text_of(DAYS.prompt_ids)}",
        *("max_tokens=null", "ignore_eos=true", "cache.max_tokens=128", f"output={output}"),
    )

    (answer,) = map(json.loads, output.read_text().splitlines())
    assert status == cli.OK
    assert len(DAYS.prompt_ids) + len(answer["token_ids"]) == 128


def test_samples_and_logprobs_reach_the_output_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"

    generate(
        f"prompt={text_of(DAYS.prompt_ids)}",
        *("n=2", "logprobs=1", "prompt_logprobs=1", f"output={output}"),
    )

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(1, 1), (1, 2)]
    assert [entry["token_id"] for entry in lines[0]["logprobs"]] == lines[0]["token_ids"]
    first, *others = lines[0]["prompt_logprobs"]
    assert first is None
    assert [entry["token_id"] for entry in others] == DAYS.prompt_ids[1:].tolist()
    assert [line[:5] for line in capsys.readouterr().out.splitlines()] == ["[1.1]", "[1.2]"]


def test_bars_show_how_far_weights_prompts_and_requests_are() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    output = RequestOutput(
        request_id=7, prompt_token_ids=np.arange(2000), metrics=RequestMetrics(arrival_s=0.0)
    )

    with Bars(console) as bars:
        bars.read_weights(2 * 10**6, 8 * 10**6)
        bars.expect([output])
        bars.update(Piece(7, prefilled=500, num_prompt_tokens=2000))
        bars.update(Piece(7, (1,), finish_reason="length", prefilled=2000))

    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "2 of 8 MB" in shown
    assert "0 of 2,000 tokens" in shown
    assert "2,000 of 2,000 tokens" in shown
    assert "1 of 1 requests" in shown


def test_ctrl_c_prints_what_was_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    step = Engine.step

    def interrupted_step(engine: Engine) -> object:
        pieces = step(engine)
        if any(piece.finish_reason for piece in pieces):
            monkeypatch.setattr(Engine, "step", stop)
        return pieces

    def stop(engine: Engine) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted_step)
    long_prompt = (MONTHS.prompt_ids.tolist() * 200)[:2000]

    status = generate(
        f"prompts=[{text_of(DAYS.prompt_ids)}]",
        f"token_ids={long_prompt}".replace(" ", ""),
        "schedule.chunk=32",
        "schedule.policy=fcfs",  # the short prompt is done first
        f"output={output}",
    )

    printed = capsys.readouterr()
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert status == INTERRUPTED
    assert [line["finish_reason"] for line in lines] == ["length", "cancelled"]
    assert printed.out.split() == ["[1]", *text_of(DAYS.answer_ids).split()]
    assert "1 of 2 prompts finished" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "prompt must be given, got none"),
        (["prompt_file=/no/such/file"], "prompt_file must be a readable UTF-8 file"),
        (["prompt=x", "max_tokens=0"], "max_tokens must be >= 1, got 0"),
        (["prompt=x", "temperature=-1"], "temperature must be a finite number >= 0, got -1.0"),
        (["prompt=x", "temperature=nan"], "temperature must be a finite number >= 0, got nan"),
        (["prompt=x", "output=/no/such/folder/x"], "output must be a file that can be written"),
        (["prompt=x", "model=/no/such/path"], "/no/such/path"),
        (["prompt=x", "cache.max_tokens=0"], "must hold at least one page"),
        (["prompt=x", "attention=magic"], "attention must be one of"),
        (["prompt=x", "device=abacus"], "device must be"),
        (["token_ids=[1]", "chat=true"], "prompt 1: chat must be false for token ids"),
        (["prompt=x", "max_tokens=5K"], "max_tokens must be int or null, got '5K'"),
        (["prompt=x", "max_tokens=5000"], "prompt 1: "),
    ],
)
def test_bad_input_is_one_line_and_no_traceback(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = generate(*words)

    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert status == cli.FAILED
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in printed.err


def test_a_biased_logit_is_never_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, banned = tmp_path / "answers.jsonl", int(DAYS.answer_ids[0])

    generate(
        f"prompt={text_of(DAYS.prompt_ids)}", f"logit_bias={{{banned}:-100}}", f"output={output}"
    )

    (line,) = (json.loads(text) for text in output.read_text().splitlines())
    assert banned not in line["token_ids"]
