"""Runs of tests in a tree with a mutant in it, and beside it in one without.

A test that fails proves nothing by itself: it may be broken, flaky or slow. It kills a mutant only
if it fails once more with the mutant and passes without it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from threading import Lock

TEST_S = 60.0  # of one test
SMALL_SHARE = 1 / 4  # of TEST_S: a test that passes sooner without the mutant hangs with it
CLOCK_SHARE = 1 / 4  # of the time on the clock counts as CPU time at least
FILE_S = 600.0  # of one file of tests, should even its timeouts fail
FORKED = Path(__file__).with_name("forked.py")
NO_TESTS = 5  # the exit code of pytest where all tests of a file are left out


class End(StrEnum):
    """The end of a run of tests."""

    PASSED = "passed"
    FAILED = "failed"
    LATE = "late"  # a test took longer than it may


@dataclass(frozen=True, slots=True)
class Run:
    """Words of one run of pytest."""

    end: End
    test: str  # that failed or was late
    wall_s: float
    cpu_s: float  # with the processes that it waited for
    said: str = ""


class Tree:
    """A copy of the code, a folder for what its tests keep, and a process to fork them from."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root = root
        self.cache = cache
        self._one_at_a_time = Lock()
        self._forks = subprocess.Popen(
            [sys.executable, str(FORKED)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        )

    def close(self) -> None:
        """End the process."""
        self._forks.communicate()

    def run(self, tests: Sequence[str], options: Sequence[str] = ()) -> Run:
        """Run tests, in the order given, until one fails."""
        words = ["-x", "-v", "--tb=no", "-rfE", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
        words += [f"--timeout={TEST_S}", "--timeout-method=thread", *options, *tests]
        environment = {
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take longer to import than many a test
            "XDG_CACHE_HOME": str(self.cache),
        }
        with self._one_at_a_time, tempfile.NamedTemporaryFile() as output:
            asked = {"words": words, "folder": str(self.root), "environment": environment}
            asked |= {"output": output.name, "limit_s": FILE_S}
            assert self._forks.stdin is not None
            assert self._forks.stdout is not None
            started_s = time.monotonic()
            print(json.dumps(asked), file=self._forks.stdin, flush=True)
            code, cpu_s = json.loads(self._forks.stdout.readline())
            wall_s = time.monotonic() - started_s
            said = Path(output.name).read_text(encoding="utf-8", errors="replace")
        return _judged(said, code, wall_s, cpu_s, tests[0])


def _judged(said: str, code: int, wall_s: float, cpu_s: float, first: str) -> Run:
    if code in (0, NO_TESTS):
        return Run(End.PASSED, "", wall_s, cpu_s)
    begun = re.findall(r"^(\S+\.py::.+?)(?: (?:[A-Z]{5,}|\+{9}).*)?$", said, re.MULTILINE)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - .*)?$", said, re.MULTILINE)
    late = "+ Timeout +" in said or code == -signal.SIGKILL
    if failed and not late:
        return Run(End.FAILED, failed[1], wall_s, cpu_s, said)
    # a process that ends in the middle of a test names it last
    last = begun[-1].strip() if begun else first
    return Run(End.LATE if late else End.FAILED, last, wall_s, cpu_s, said)


class Verdict(StrEnum):
    """Verdict of the tests on a mutant."""

    KILLED = "killed"
    HANGS = "hangs"  # killed as well: a test that soon ends without the mutant does not end with it
    LIVES = "lives"


@dataclass(slots=True)
class Judge:
    """Tries mutated trees, with the tests as they are in a tree that is not mutated."""

    plain: Tree
    limit_s: float  # of CPU time that passing tests may take for one mutant
    seconds: dict[str, float] = field(default_factory=dict)  # by file of tests that passed
    not_counted: set[str] = field(default_factory=set)  # tests that fail without a mutant too

    def try_out(
        self, tree: Tree, files: Callable[[Mapping[str, float]], Sequence[str]]
    ) -> tuple[Verdict, str, list[str]]:
        """Run files of tests until one kills the mutant or the time is spent.

        Returns:
            The verdict, the test that decided it, and the files that passed.
        """
        passed: list[str] = []
        spent_s = 0.0
        for file in files(self.seconds):
            verdict, test, seconds = self._file(tree, file)
            if verdict is not Verdict.LIVES:
                return verdict, test, passed
            passed.append(file)
            spent_s += seconds
            if spent_s > self.limit_s:
                break
        return Verdict.LIVES, "", passed

    def _file(self, tree: Tree, file: str) -> tuple[Verdict, str, float]:
        while True:
            known = [test for test in list(self.not_counted) if test.startswith(file)]
            run = tree.run([file], [f"--deselect={test}" for test in known])
            if run.end is End.PASSED or run.test in known:
                # ranks are no children of pytest, and only the clock tells what they take
                self.seconds[file] = max(run.cpu_s, CLOCK_SHARE * run.wall_s)
                return Verdict.LIVES, "", self.seconds[file]
            verdict = self._confirmed(tree, run)
            if verdict is not Verdict.LIVES:
                return verdict, run.test, run.wall_s
            self.not_counted.add(run.test)

    def _confirmed(self, tree: Tree, run: Run) -> Verdict:
        """Tell if a failure is the mutant's doing."""
        options = [] if "::" in run.test else ["--collect-only"]
        plain = self.plain.run([run.test], options)
        if plain.end is not End.PASSED:
            assert "::" in run.test, f"{run.test} fails without a mutant:\n{plain.said}"
            return Verdict.LIVES
        if run.end is End.LATE:
            hangs = plain.wall_s < SMALL_SHARE * TEST_S
            return Verdict.HANGS if hangs else Verdict.LIVES
        again = tree.run([run.test], options)
        return Verdict.LIVES if again.end is End.PASSED else Verdict.KILLED


def renew(cache: Path, source: Path) -> None:
    """Rebuild a folder of kept files: a mutant may have written nonsense there."""
    shutil.rmtree(cache, ignore_errors=True)
    shutil.copytree(source, cache, copy_function=os.link)
