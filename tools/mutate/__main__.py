"""Small wrong changes to the code, one at a time: do the tests notice?

Mutants are drawn with a seed, evenly over the rooms. Each is put into a copy of the last commit,
and the files of tests that concern its module run there until one fails: first those that have its
name or import it, then the rest of its room, then those that import what imports it; at each
distance the fastest first. A failure counts if it comes back, and not without the mutant. A mutant
that every test lets pass, within a limit of CPU time, lives. Some change nothing that a caller
could see; these are explained in explained.json beside this.

Usage: python -m tools.mutate [--count 60] [--seed 0] [--rooms schedule cache ...] [--limit 120]
       [--jobs 1] [--skip 0] [--json FILE] [--list]
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from mnemosyne.machine import cache_folder
from tools.mutate.concerned import files_concerning
from tools.mutate.mutants import ROOT, Mutant, mutants_of
from tools.mutate.runs import Judge, Tree, Verdict, renew

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
FOLDERS = ("mnemosyne", "model_zoo", "kernels", "tests")
ON_A_GPU = ("kernels/hopper_chunk.py",)  # runs nowhere else, so only the tests of a GPU can tell


@dataclass(frozen=True, slots=True)
class Outcome:
    """Fate of a mutant."""

    mutant: Mutant
    verdict: Verdict
    seconds: float
    test: str  # that killed it
    passed: list[str]  # files of tests that did not
    why: str  # it may live

    def __str__(self) -> str:
        files = f"{len(self.passed)} files of tests passed"
        told = self.test or f"{files}; {self.why or 'unexplained'}"
        return f"{self.verdict:<7}{self.seconds:5.0f} s  {self.mutant}  [{told}]"


def draw(rooms: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """A number of mutants, evenly over the rooms."""
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


def explanation(mutant: Mutant) -> str:
    """The reason why a mutant may live; empty if none is written down."""
    for entry in json.loads(EXPLAINED.read_text(encoding="utf-8")):
        if all(entry[name] == getattr(mutant, name) for name in ("path", "text", "before")):
            return str(entry["why"])
    return ""


def try_out(trees: SimpleQueue[Tree], judge: Judge, mutant: Mutant) -> Outcome:
    """Put a mutant into a tree that nobody uses, run its tests, and take it out again."""
    tree, started_s = trees.get(), time.monotonic()
    file = tree.root / mutant.path
    text = file.read_bytes()
    try:
        renew(tree.cache, judge.plain.cache)
        file.write_bytes(mutant.source(text))
        verdict, test, passed = judge.try_out(tree, partial(files_concerning, mutant.path))
    finally:
        file.write_bytes(text)
        trees.put(tree)
    why = explanation(mutant) if verdict is Verdict.LIVES else ""
    return Outcome(mutant, verdict, time.monotonic() - started_s, test, passed, why)


def try_all(
    drawn: Sequence[Mutant], jobs: int, limit_s: float
) -> Iterator[tuple[Outcome, set[str]]]:
    """The outcomes as they come, each with the tests that were not counted so far."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        plain, *mutated = (_tree(Path(folder) / str(number)) for number in range(jobs + 1))
        shutil.copytree(cache_folder(), plain.cache / "mnemosyne")
        trees: SimpleQueue[Tree] = SimpleQueue()
        for tree in mutated:
            trees.put(tree)
        judge = Judge(plain, limit_s)
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(try_out, trees, judge, mutant) for mutant in drawn]
            try:
                for future in as_completed(futures):
                    yield future.result(), set(judge.not_counted)
            finally:
                pool.shutdown(cancel_futures=True)
                for tree in (plain, *mutated):
                    tree.close()


def _tree(folder: Path) -> Tree:
    """The last commit, as files."""
    root = folder / "tree"
    root.mkdir(parents=True)
    command = ["git", "-C", str(ROOT), "archive", "HEAD"]
    archive = subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(root)], input=archive.stdout, check=True)
    return Tree(root, folder / "cache")


def _git(*words: str) -> str:
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0, help="the first mutants of the draw")
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--limit", type=float, default=120.0, help="CPU seconds for one mutant")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--json", help="write the outcomes to this file as they come")
    parser.add_argument("--list", action="store_true", help="show the mutants and run nothing")
    arguments = parser.parse_args()
    if _git("status", "--porcelain", *FOLDERS):
        parser.error("the code and its tests must be as in the last commit; commit or stash first")
    drawn = draw(arguments.rooms, arguments.count, arguments.seed)[arguments.skip :]
    if arguments.list:
        print(*drawn, sep="\n")
        return 0
    head, outcomes, ignored = _git("rev-parse", "--short", "HEAD"), [], set()
    for outcome, ignored in try_all(drawn, arguments.jobs, arguments.limit):
        print(outcome, flush=True)
        outcomes.append(outcome)
        if arguments.json:
            table = {"commit": head, "seed": arguments.seed, "not_counted": sorted(ignored)}
            table["outcomes"] = [asdict(each) for each in outcomes]
            Path(arguments.json).write_text(json.dumps(table, indent=1), encoding="utf-8")
    found = Counter(outcome.verdict for outcome in outcomes)
    bare = sum(outcome.verdict is Verdict.LIVES and not outcome.why for outcome in outcomes)
    print(f"tests that fail or are slow without a mutant, not counted: {sorted(ignored) or 'none'}")
    print(
        f"{len(outcomes)} mutants of {head}, seed {arguments.seed}: {found[Verdict.KILLED]} "
        f"killed, {found[Verdict.HANGS]} hang, {found[Verdict.LIVES]} live, {bare} of them "
        "unexplained"
    )
    return 1 if bare else 0


if __name__ == "__main__":
    sys.exit(main())
