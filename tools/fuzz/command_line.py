"""The door of the command line: words as shells hand them over, typed well and badly."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mnemosyne import cli
from mnemosyne.cli.arguments import key_types
from mnemosyne.model_zoo.needle import write_needle
from tools.fuzz.door import Door

STATUSES = (0, 1, 2, 141)  # 1: the demo did not find its passkey
START_S, LIMIT_S = 60.0, 30.0  # of a process on a busy machine; of a line
PROCESS_SHARE = 0.03  # of lines that a process of their own runs
SMALL = "workload.num_requests"  # without it a simulation takes minutes
BASES = {
    "generate": ["model=MODEL", "token_ids=[5,6,7]", "max_tokens=2", "cache.max_tokens=2K"],
    "simulate": ["model=llama3_8b", "hardware=h100", "workload=short", "workload.num_requests=3"],
    "plan": ["model=llama3_8b", "gpus=2", "hardware=h100", "context=64K"],
    "demo": ["length=1K", "num_short=2"],
    "bench": ["model=bench", "peers=[]"],
}
GOOD = {
    "generate": [
        *("schedule.chunk=64", "temperature=0.5", "seed=3", "n=2", "stream=false", "logprobs=2"),
        *("stop=[a,b]", "dtype=float32", "attention=cpu", "prompt=the river", "output=out.jsonl"),
        *("metrics.path=steps.jsonl", "deadline=2s", "prompt_file=-", "cache.page_size=64"),
        *("prompts=[a,'b c']", "slo.ttft_min=30ms", "schedule=fixed", "top_p=0.5", "priority=1"),
    ],
    "simulate": ["mesh.tp=2", "schedule.chunk=512", "metrics.path=steps.jsonl", "seed=1"],
    "plan": ["context=128K", "gpus=1", "slo.ttft=100s", "show=3"],
    "demo": ["depth=0.1", "seed=2", "model=needle"],
    "bench": ["model=MODEL", "output=bench.json", "threads=2"],
}
TEXTS = [
    *("", " ", "null", "???", "true", "-1", "0", "nan", "inf", "-inf", "1e400", "5K", "9" * 30),
    *("1_000", "0x10", "1e308", "3.7", "é", "日本", "\udcff", "\n", "\t", "a" * 3000, "'", '"'),
    *("[", "]", "[]", "[[]]", "[" * 40, "{", "{}", "{a:1}", "{a:{b:[1,{c:2}]}}", "[1,2", "1,2"),
    *("${model}", "${nowhere}", "${oc.env:HOME}", "${", "$", "~", "\\", "a=b", "=", "==", "@x"),
    *("/no/such/file", "folder", "folder/x", "/dev/null", "/proc/self/mem", ".", "..", "-", "--"),
    *("choice(1,2)", "range(1,3)", "glob(*)", "int(3)", "str(3)", "tag(a,1)", "shuffle(1,2)"),
]
WORDS = [
    *("", "=", "==", "a", "a.b.c=1", "=3", "+a=1", "++max_tokens=3", "~max_tokens", "model", "-"),
    *("--help", "-h", "--cfg", "--cfg=job", "-c", "--resolve", "--multirun", "-m", "--info"),
    *("--no-such-flag", "--max-tokens=3", "--hydra-help", "-cd", "--package=x", "hydra.x=1"),
    *("hydra/launcher=basic", "hydra.verbose=true", "schedule=nowhere", "mesh=", "\x01"),
]


@dataclass(frozen=True, slots=True)
class Line:
    """One command line, and what is odd about the process that runs it."""

    words: tuple[str, ...]
    closed: str | None = None  # a standard stream
    is_process: bool = False


@contextmanager
def command_line_door() -> Iterator[Door]:
    """Words for ``mnemosyne``, most of them run in this process, in an empty folder."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name in ("run", "temporary", "cache"):
            (folder / name).mkdir()
        surroundings = {
            "TMPDIR": str(folder / "temporary"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHONPATH": os.pathsep.join((os.getcwd(), os.environ.get("PYTHONPATH", ""))),
        }
        stack.enter_context(patch.dict(os.environ, surroundings))
        stack.enter_context(patch.object(tempfile, "tempdir", surroundings["TMPDIR"]))
        # These take minutes, or start other processes; here only their words matter.
        for name in ("demo", "bench"):
            command = replace(cli.COMMANDS[name], run=lambda config: 0)
            stack.enter_context(patch.dict(cli.COMMANDS, {name: command}))
        launch = "mnemosyne.parallel.launch.launch_local"
        stack.enter_context(patch(launch, lambda command, world_size: 0))
        shell = _Shell(folder, str(write_needle(folder / "needle")))
        stack.enter_context(chdir(folder / "run"))
        yield Door(
            name="command_line",
            draw=draw,
            feed=shell.feed,
            control=shell.control,
            limit_s=LIMIT_S + START_S,
        )


def draw(rng: random.Random) -> Line:
    """A command that makes sense, and up to three changes that may not."""
    name = rng.choice(list(BASES))
    words = [name, *BASES[name], *rng.sample(GOOD[name], rng.choice([0, 1, 2]))]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        rng.choice(CHANGES)(rng, words)
    closed = rng.choice(["stdin", "stdout", "stderr"]) if rng.random() < 0.05 else None
    return Line(tuple(words), closed, rng.random() < PROCESS_SHARE)


def _set_key(rng: random.Random, words: list[str]) -> None:
    """Give any key any value; those that only make a right command slow are left alone."""
    name = words[0] if words and words[0] in BASES else "generate"
    keys = [key for key in key_types(cli.COMMANDS[name].config) if key not in ("compile",)]
    words.append(f"{rng.choice(keys)}={rng.choice(TEXTS)}")


def _change_value(rng: random.Random, words: list[str]) -> None:
    index = rng.randrange(len(words))
    words[index] = words[index].partition("=")[0] + "=" + rng.choice(TEXTS)


def _mistype(rng: random.Random, words: list[str]) -> None:
    index = rng.randrange(len(words))
    word = words[index]
    place = rng.randrange(len(word) + 1)
    inserted = rng.choice(["", "x", ".", "=", "é", "[", " "])
    words[index] = word[:place] + inserted + word[place + rng.choice([0, 1]) :]


def _add_word(rng: random.Random, words: list[str]) -> None:
    words.insert(rng.randrange(len(words) + 1), rng.choice(WORDS))


def _drop_word(rng: random.Random, words: list[str]) -> None:
    if len(words) > 1:
        del words[rng.randrange(len(words))]


CHANGES: list[Callable[[random.Random, list[str]], None]] = [
    *(_set_key, _set_key, _set_key, _change_value, _change_value, _mistype),
    *(_add_word, _drop_word),
]


class _Shell:
    """Runs lines, and looks at what they say and leave behind."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder, self._model = folder, model
        self._num_controls = 0
        (folder / "run" / "folder").mkdir()
        self._control = Line(("generate", *BASES["generate"], "schedule.chunk=64"))
        self._expected = self._run(self._control)
        assert self._expected[0] == 0, self._expected

    def feed(self, line: Line) -> bool:
        status, printed, said = self._run(line)
        assert status in STATUSES, f"exit status {status}: {said[-300:]}"
        for text in (printed, said):
            assert "Traceback" not in text, text[-400:]
            assert "HYDRA_FULL_ERROR" not in text, text[-400:]
        if status == cli.FAILED and line.closed != "stderr":
            has_usage = not line.words or line.words[0] in ("-h", "--help")
            assert has_usage or "error: " in said, f"no reason is given: {said[-300:]!r}"
        self._clean()
        return status == cli.OK

    def control(self) -> None:
        status, printed, _ = self._run(Line(("--help",)))
        assert (status, printed.strip()) == (cli.OK, cli.usage()), "help is another"
        self._num_controls += 1
        if self._num_controls % 20 == 0:
            assert self._run(self._control)[:2] == self._expected[:2], "an answer is another"

    def _run(self, line: Line) -> tuple[int, str, str]:
        words = [word.replace("MODEL", self._model) for word in line.words]
        if words[:1] == ["simulate"] and not any(SMALL in word for word in words):
            words.insert(1, f"{SMALL}=3")
        if (
            line.is_process
            and not {"bench", "demo"} & set(words)
            and all("\0" not in word for word in words)
        ):
            return _run_process(words, line.closed)
        return _run_here(words, line.closed)

    def _clean(self) -> None:
        """Take away the files that a command was asked for; anything else is a fault."""
        found = (path.name for path in (self._folder / "temporary").iterdir())
        left = [name for name in found if not name.startswith("torchinductor")]
        assert not left, f"left behind: {left}"
        for path in (self._folder / "run").iterdir():
            if path.is_file():
                path.unlink()
        assert [path.name for path in (self._folder / "run").iterdir()] == ["folder"], "new folders"
        for path in (self._folder / "run" / "folder").iterdir():
            path.unlink()


def _run_here(words: Sequence[str], closed: str | None) -> tuple[int, str, str]:
    printed, said = io.StringIO(), io.StringIO()
    streams: dict[str, Any] = {"stdin": io.StringIO("the river\n")}
    with (
        redirect_stdout(printed),
        redirect_stderr(said),
        patch.multiple(sys, **streams),
        patch.object(sys, closed, None) if closed else ExitStack(),
    ):
        status = cli.main(words)
        opened = getattr(sys, closed) if closed else None
        if opened is not None:
            opened.close()
    return status, printed.getvalue(), said.getvalue()


def _run_process(words: Sequence[str], closed: str | None) -> tuple[int, str, str]:
    close = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", None: ""}[closed]
    command = ["sh", "-c", f'"$@" {close}', "sh", sys.executable, "-m", "mnemosyne"]
    done = subprocess.run(
        [*command, *(word.encode("utf-8", "surrogateescape") for word in words)],
        input=b"the river\n",
        capture_output=True,
        timeout=START_S,
        check=False,
    )
    return done.returncode, *(text.decode(errors="replace") for text in (done.stdout, done.stderr))
