"""Small wrong changes to the code, one at a time: do the tests notice?

Mutants are drawn with a seed, evenly over the rooms. Each is put into a copy of the last commit,
and the tests that concern its module run there until one fails: first those that import the module
or have its name, then the rest of its room, then those that import what imports it. A mutant that
every one of them lets pass lives. Some change nothing that a caller could see; these are explained
in explained.json beside this, by file and by what stood there before and after.

Usage: python -m tools.mutate [--count 60] [--seed 0] [--rooms schedule cache ...] [--limit 300]
       [--json FILE] [--list]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.mutate.mutants import ROOT, Mutant, mutants_of

EXPLAINED = Path(__file__).with_name("explained.json")
ROOMS = {
    "schedule": "mnemosyne/schedule/*.py",
    "cache": "mnemosyne/cache/*.py",
    "attention": "mnemosyne/attention/*.py",
    "parallel": "mnemosyne/parallel/*.py",
    "runtime": "mnemosyne/runtime/*.py",
    "serve": "mnemosyne/serve/*.py",
    "simulate": "mnemosyne/simulate/*.py",
    "model_zoo": "model_zoo/*.py",
    "kernels": "kernels/**/*.py",
    "config": "mnemosyne/config*.py",
}
ON_A_GPU = ("kernels/hopper_chunk.py",)  # runs nowhere else, so only the tests of a GPU can tell
MOST_FILES = 24  # of tests for one mutant
TEST_S = 60  # of one test
KILLED, LIVES, LATE = "killed", "lives", "timeout"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    outcome: str
    seconds: float
    test: str = ""  # that failed
    why: str = ""  # it may live


def draw(rooms: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """So many mutants, evenly over the rooms."""
    generator = random.Random(seed)
    pools = []
    for room in rooms:
        paths = [ROOT / p for p in _paths(room)]
        found = [mutant for path in paths for mutant in mutants_of(path)]
        generator.shuffle(found)
        pools.append(found)
    drawn: list[Mutant] = []
    while len(drawn) < count and any(pools):
        drawn += [pool.pop() for pool in pools if pool]
    return drawn[:count]


def _paths(room: str) -> list[str]:
    found = (str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(ROOMS[room])))
    return [path for path in found if path not in ON_A_GPU]


def module_of(path: str) -> str:
    """The dotted name of a file as tests import it."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("mnemosyne") else f"mnemosyne.{name}"


def _importers(module: str, folder: str) -> Iterator[Path]:
    """Files that import a module, or a name of it from its room."""
    room, _, name = module.rpartition(".")
    whole = rf"^\s*(from {re.escape(module)} import|import {re.escape(module)}\b)"
    part = rf"^\s*from {re.escape(room)} import [^\n]*\b{re.escape(name)}\b"
    pattern = re.compile(f"{whole}|{part}", re.MULTILINE)
    for path in sorted(ROOT.glob(folder)):
        if pattern.search(path.read_text(encoding="utf-8")):
            yield path


def files_concerning(path: str) -> list[str]:
    """Files of tests that concern a file, the nearest first."""
    module = module_of(path)
    parts = module.split(".")
    room = parts[1] if len(parts) > 2 else ""
    near = list(_importers(module, "tests/**/test_*.py"))
    named = sorted(ROOT.glob(f"tests/**/test_*{parts[-1]}*.py"))
    rest = sorted(ROOT.glob(f"tests/{room}/test_*.py")) if room else []
    far = [
        test
        for folder in ("mnemosyne/*.py", "mnemosyne/*/*.py")
        for user in _importers(module, folder)
        for test in _importers(module_of(str(user.relative_to(ROOT))), "tests/**/test_*.py")
    ]
    ordered = dict.fromkeys(str(test.relative_to(ROOT)) for test in (*named, *near, *rest, *far))
    return list(ordered)[:MOST_FILES]


def run_tests(tree: Path, tests: Sequence[str], limit_s: float) -> tuple[str, str]:
    """Run files of tests in a tree until one fails: killed, lives or timeout, and by which."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider"]
    command += [f"--timeout={TEST_S}", "--timeout-method=thread", *tests]
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return LATE, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if "+ Timeout +" in done.stderr + done.stdout:
        return KILLED, f"a test took over {TEST_S} s"
    if done.returncode == 0:
        return LIVES, ""
    return KILLED, failed[1] if failed else (done.stdout + done.stderr)[-200:].strip()


def copy_of_head(folder: Path) -> Path:
    """The last commit, as files."""
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD"], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def try_out(tree: Path, mutant: Mutant, limit_s: float) -> Outcome:
    """Put a mutant into a tree, run its tests, and take it out again."""
    file, started_s = tree / mutant.path, time.monotonic()
    text = file.read_bytes()
    try:
        changed = mutant.source(text)
        compile(changed, mutant.path, "exec")
        file.write_bytes(changed)
        outcome, test = run_tests(tree, files_concerning(mutant.path), limit_s)
    finally:
        file.write_bytes(text)
    why = "" if outcome == KILLED else explanation(mutant)
    return Outcome(mutant, outcome, time.monotonic() - started_s, test, why)


def explanation(mutant: Mutant) -> str:
    """Why a mutant may live; empty if nobody has said."""
    if not EXPLAINED.exists():
        return ""
    for entry in json.loads(EXPLAINED.read_text(encoding="utf-8")):
        if all(entry[name] == getattr(mutant, name) for name in ("path", "before", "after")):
            return str(entry["why"])
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one mutant")
    parser.add_argument("--json", help="write the outcomes to this file as they come")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    arguments = parser.parse_args()
    drawn = draw(arguments.rooms, arguments.count, arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = copy_of_head(Path(folder))
        for mutant in drawn:
            if arguments.list:
                print(mutant)
                continue
            outcome = try_out(tree, mutant, arguments.limit)
            outcomes.append(outcome)
            told = outcome.test or outcome.why
            print(f"{outcome.outcome:<8}{outcome.seconds:6.0f} s  {mutant}  {told}", flush=True)
            if arguments.json:
                text = json.dumps([asdict(each) for each in outcomes], indent=1)
                Path(arguments.json).write_text(text, encoding="utf-8")
    living = [outcome for outcome in outcomes if outcome.outcome == LIVES]
    unexplained = [outcome for outcome in living if not outcome.why]
    late = sum(outcome.outcome == LATE for outcome in outcomes)
    print(
        f"{len(outcomes)} mutants: {len(living)} live, {len(unexplained)} of them unexplained; "
        f"{late} ran out of time"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
