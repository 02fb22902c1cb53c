"""Blocks of code on pages for people, and the commands in them; checked without running them.

A command is taken for right if its first word is known here and what would run understands the
rest: a config is composed and checked, options are parsed, targets, files and extras are there.
"""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed.run as torchrun
import yaml

from mnemosyne import cli

ROOT = Path(__file__).parents[1]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)((?:(?: {4}.*)?\n)*? {4}.*\n(?:(?: {4}.*)?\n)*)")
NOT_RUN = re.compile(r"^\s*(?:#|<!--) not run: (.*?)(?: -->)?$", re.MULTILINE)
REASONS = ("SLURM", "Kubernetes", "systemd", "several hosts", "a GPU", "your own files")
# What stands for a value of the reader's.
STANDINS = {
    "SHAPE": "llama3_8b",
    "N": "16",
    "LENGTH": "128K",
    "AXIS": "spp",
    "URL": "http://127.0.0.1:8000",
}


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code on a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def not_run(self) -> str | None:
        """Return why nothing of it is run, None if it is for everybody."""
        found = NOT_RUN.search(self.text)
        return found[1] if found else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced and the indented blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for found in FENCED.finditer(text):
        yield Block(page, text[: found.start()].count("\n") + 1, found[1], found[2])
    # fences are blanked, so that lines keep their numbers
    rest = FENCED.sub(lambda found: "\n" * found[0].count("\n") + "x", text)
    for found in INDENTED.finditer(rest):
        yield Block(page, rest[: found.start()].count("\n") + 1, "", found[1])


def commands(text: str) -> Iterator[str]:
    """Yield the commands of a block: lines joined where they go on, no remarks."""
    for line in re.sub(r"\s*\\\n\s*|(?<=\|)\n\s*", " ", text).splitlines():
        line = re.sub(r"(?:^|\s+)# .*", "", line).strip()
        if line and not line.startswith("#"):
            yield line


def engine_commands(text: str) -> Iterator[list[str]]:
    """Yield the words after ``mnemosyne`` wherever a script, a unit or a manifest calls it."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    for found in re.finditer(
        r"(?:^|[\s/])mnemosyne ((?:generate|serve|drain|demo) [^&;|<>\"\n#]*)", joined
    ):
        yield shlex.split(re.sub(r"\$\{?\w+\}?", "x1", found[1]))
    if text.lstrip().startswith("apiVersion"):
        yield from ([str(w) for w in args[1:]] for args in _lists(yaml.safe_load(text)))


def _lists(tree: Any) -> Iterator[list[Any]]:
    """Yield the argument lists of a manifest that call the program."""
    if isinstance(tree, list) and tree[:1] == ["mnemosyne"]:
        yield tree
    for child in (
        tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    ):
        yield from _lists(child)


def check(command: str) -> None:
    """Check one command of a shell; an error says what is wrong with it."""
    lexer = shlex.shlex(command.partition(" < ")[0], posix=True, punctuation_chars="();|")
    lexer.whitespace_split = True
    parts = [list(part) for _, part in groupby(lexer, key=lambda word: not set(word) - set("();|"))]
    for part in parts:
        if set(part[0]) - set("();|"):
            check_part(part, command)


def check_part(part: list[str], command: str) -> None:
    """Check one program of a command."""
    first, *words = part
    words = [STANDINS.get(word, word) for word in words]
    name = Path(first).name
    if name not in CHECKS:
        raise ValueError(f"a command on a page must be one that is checked, got {command!r}")
    CHECKS[name](words)


def check_engine(words: list[str]) -> None:
    """Compose and check the config of a command of this project."""
    if "..." in words:  # stands for whatever else is needed
        words = [word for word in words if word != "..."]
        words += [] if any(word.startswith("model=") for word in words) else ["model=x"]
    # launchers of others are not installed here
    words = [word for word in words if not word.startswith("hydra")]
    words = ["url=URL" if word == "url=..." else word for word in words]
    words = [re.sub(r"=([A-Z]+)$", lambda f: f"={STANDINS.get(f[1], f[1])}", w) for w in words]
    is_name = " ".join(words) in (*cli.COMMANDS, "--help") or words[:1] == ["COMMAND"]
    if not is_name:
        with patch.object(cli, "_run_composed", lambda *_: cli.OK):
            assert cli.main(words) == cli.OK, words


def check_python(words: list[str]) -> None:
    """Parse the options of a tool or an example; one that parses none has none."""
    path = ROOT / words[0]
    assert path.is_file(), words
    if "argparse" not in path.read_text(encoding="utf-8"):
        return
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> Any:
        parse(parser, *arguments, **keywords)
        raise ParsedError

    with (
        patch.object(sys, "argv", [str(path), *words[1:]]),
        patch.object(argparse.ArgumentParser, "parse_args", stop),
        patch.object(sys, "path", [str(path.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except ParsedError:
            return
        except SystemExit:
            raise ValueError(f"options of {words[0]} must be its own, got {words[1:]}") from None
    raise AssertionError(f"{words[0]} parsed no options")


class ParsedError(Exception):
    """The options of a tool were understood."""


def check_torchrun(words: list[str]) -> None:
    """Parse the options of torchrun, then check what each rank is to run."""
    own = words.index("-m") if "-m" in words else 0
    words = [*(word for word in words[:own] if word != "..."), *words[own:]]
    options = torchrun.get_args_parser().parse_args(words)
    if options.module:
        assert options.training_script == "mnemosyne"
        check_engine(options.training_script_args)
    else:
        check_python([options.training_script, *options.training_script_args])


def check_make(words: list[str]) -> None:
    """Look for the targets."""
    targets = re.findall(
        r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {word for word in words if "=" not in word} <= set(targets), words


def check_pip(words: list[str]) -> None:
    """Look for the extras of this project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words:
        found = re.search(r"\[([\w,]+)\]$", word)
        assert found is None or set(found[1].split(",")) <= set(project["optional-dependencies"])
    assert words[0] in ("install", "wheel")


def check_pytest(words: list[str]) -> None:
    """Look for the files."""
    assert [w for w in words if w.startswith("tests") and not (ROOT / w).exists()] == []


def check_curl(words: list[str]) -> None:
    """Parse the body."""
    for flag, value in pairwise(words):
        if flag == "-d":
            json.loads(value)


def check_shell(text: str) -> None:
    """Parse a script, and check the commands of this project in it."""
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_nothing(words: list[str]) -> None:
    """Accept a command that has nothing to check."""


CHECKS = {
    "mnemosyne": check_engine,
    "python": check_python,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "curl": check_curl,
    "pre-commit": check_nothing,
    "run": check_nothing,  # .ci/run
    "echo": check_nothing,
    "sleep": check_nothing,
}
