"""Signals and closed streams end a command as they should: finished work stays, no traceback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mnemosyne import cli
from mnemosyne.process import INTERRUPTED, TERMINATED, UNREAD, Terminated, open_streams, terminable
from tests.model_zoo.tiny import tiny_checkpoint

PYTHON = (sys.executable, "-m", "mnemosyne")
PLAN = (*PYTHON, "plan", "model=llama3_8b", "gpus=8", "hardware=h100", "context=128K")
DURING_IMPORT = """
import os, signal, sys
from mnemosyne.__main__ import main

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Finder())
sys.exit(main())
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("process") / "tiny")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["hydra", "torch"])
def test_a_signal_during_imports_ends_the_command_without_a_word(module: str, name: str) -> None:
    code = DURING_IMPORT.format(module=module, name=name)
    words = ["generate", "model=needle", "prompt=x"]

    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)

    assert done.returncode == 128 + signal.Signals[name]
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("function", ["update", "merge"])
def test_what_omegaconf_makes_of_a_signal_is_not_heard(function: str, name: str) -> None:
    code = f"""
import os, signal, sys
from omegaconf import OmegaConf
from mnemosyne.__main__ import main

usual = OmegaConf.{function}

def interrupted(*arguments, **named):
    try:
        os.kill(os.getpid(), signal.{name})
    except BaseException as error:
        raise AttributeError("'NoneType' object has no attribute") from error
    return usual(*arguments, **named)

OmegaConf.{function} = interrupted
sys.exit(main())
"""

    done = subprocess.run([sys.executable, "-c", code, *PLAN[3:]], capture_output=True, text=True)

    assert done.returncode == 128 + signal.Signals[name]
    assert (done.stdout, done.stderr) == ("", "")


def test_a_ctrl_c_at_the_very_end_changes_neither_status_nor_words() -> None:
    code = """
import atexit, signal, sys
atexit.register(signal.raise_signal, signal.SIGINT)
sys.argv = ["mnemosyne", "no such command"]
from mnemosyne.__main__ import main
sys.exit(main())
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("name", "status"), [("SIGINT", INTERRUPTED), ("SIGTERM", TERMINATED)])
def test_what_was_finished_is_printed_and_written(
    name: str, status: int, checkpoint: Path, tmp_path: Path
) -> None:
    steps, output = tmp_path / "steps.jsonl", tmp_path / "answers.jsonl"
    ids = json.dumps([[5, 6]] * 40).replace(" ", "")
    words = (f"model={checkpoint}", f"token_ids={ids}", "max_tokens=100", "ignore_eos=true")
    engine = ("schedule.chunk=8", "schedule.max_sequences=1", "cache.max_tokens=4096")
    files = (f"metrics.path={steps}", f"output={output}")

    process = subprocess.Popen(
        [*PYTHON, "generate", *words, *engine, *files],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (steps.exists() and steps.read_text().count("\n") > 250):
        time.sleep(0.005)
    process.send_signal(signal.Signals[name])
    printed, said = process.communicate(timeout=60)

    reasons = [json.loads(line)["finish_reason"] for line in output.read_text().splitlines()]
    num_finished = reasons.count("length")
    assert process.returncode == status
    assert num_finished >= 2
    assert reasons.count("cancelled") == 40 - num_finished > 0
    assert len(printed.splitlines()) >= num_finished
    assert "Traceback" not in said


def test_sigterm_is_heard_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    usual = signal.getsignal(signal.SIGTERM)

    with terminable() as termination:
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    assert termination.came
    assert signal.getsignal(signal.SIGTERM) is usual


def test_sigterm_of_a_rank_is_a_matter_of_its_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    usual = signal.getsignal(signal.SIGTERM)

    with terminable():
        assert signal.getsignal(signal.SIGTERM) is usual


def closed(descriptor: int, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Run a command with one of its standard streams closed."""
    streams = {0: "<&-", 1: ">&-", 2: "2>&-"}
    return subprocess.run(
        ["sh", "-c", f'"$@" {streams[descriptor]}', "sh", *command], capture_output=True, text=True
    )


def test_a_closed_standard_input_is_no_prompt(checkpoint: Path) -> None:
    done = closed(0, (*PYTHON, "generate", f"model={checkpoint}", "prompt_file=-"))

    assert done.returncode == cli.FAILED
    assert done.stderr == (
        "error: prompt_file must be open when it is standard input, got one that was closed; "
        "name a file\n"
    )


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_closed_stream_stops_nothing(descriptor: int) -> None:
    done = closed(descriptor, PLAN)

    assert done.returncode == cli.OK
    assert ("best: " in done.stdout) is (descriptor != 1)
    assert "Traceback" not in done.stderr


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path: Path, checkpoint: Path) -> None:
    output = tmp_path / "answers.jsonl"
    words = ("token_ids=[1,2]", "max_tokens=2", "schedule.chunk=8", "cache.max_tokens=512")

    done = closed(1, (*PYTHON, "generate", f"model={checkpoint}", *words, f"output={output}"))

    assert done.returncode == cli.OK
    (line,) = output.read_text().splitlines()
    assert json.loads(line)["finish_reason"] == "length"


def test_a_reader_that_goes_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(PLAN, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)

    assert done.returncode == UNREAD
    assert "Traceback" not in done.stderr
    assert "error" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_standard_output_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(PLAN, stdout=full, stderr=subprocess.PIPE, text=True)

    assert done.returncode == cli.FAILED
    assert [line for line in done.stderr.splitlines() if "No space left" in line]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_characters_that_standard_output_has_no_code_for_are_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)

    open_streams()
    stream.write("caf\u00e9 \udc80")
    stream.flush()

    assert stream.buffer.getvalue() == rb"caf\xe9 \udc80"
