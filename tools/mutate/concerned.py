"""The files of tests that concern a file of the code, the nearest and fastest first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

from tools.mutate.mutants import ROOT

TESTS = "tests/**/test_*.py"
MOST_FILES = 24  # of tests for one mutant
UNKNOWN_S, RANKS_S = 10.0, 40.0  # what a file of tests may take that nobody has timed


def module_of(path: str) -> str:
    """The dotted name of a file as tests import it."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("mnemosyne") else f"mnemosyne.{name}"


def files_concerning(path: str, seconds: Mapping[str, float] | None = None) -> list[str]:
    """Files of tests that concern a file: nearest first.

    Those of its name, those that import it, those of the name of what imports it in its room, the
    rest of the room, and those that import what imports it.

    Args:
        path: of the code, from the root.
        seconds: what files of tests took; among those that are equally near the fastest goes first.
    """
    module = module_of(path)
    parts = module.split(".")
    room = parts[1] if len(parts) > 2 else ""
    named = sorted(ROOT.glob(f"tests/**/test_*{parts[-1]}*.py"))
    near = _importers(module, TESTS)
    beside = [
        test
        for user in (_importers(module, f"{Path(path).parent}/*.py") if room else [])
        for test in ROOT.glob(f"tests/{room}/**/test_*{user.stem}*.py")
    ]
    rest = sorted(ROOT.glob(f"tests/{room}/**/test_*.py")) if room else []
    far = [
        test
        for user in chain(*(_importers(module, f"mnemosyne/{part}") for part in ("*.py", "*/*.py")))
        for test in _importers(module_of(str(user.relative_to(ROOT))), TESTS)
    ]
    known = {str(test.relative_to(ROOT)): RANKS_S for test in _importers("tests.ranks", TESTS)}
    known |= seconds or {}
    ordered: dict[str, None] = {}
    for tests in (named, near, beside, rest, far):
        files = [str(test.relative_to(ROOT)) for test in tests]
        ordered |= dict.fromkeys(sorted(files, key=lambda file: known.get(file, UNKNOWN_S)))
    return list(ordered)[:MOST_FILES]


def _importers(module: str, folder: str) -> Iterator[Path]:
    """Files that import a module, or a name of it from its room."""
    room, _, name = module.rpartition(".")
    whole = rf"^\s*(from {re.escape(module)} import|import {re.escape(module)}\b)"
    part = rf"^\s*from {re.escape(room)} import [^\n]*\b{re.escape(name)}\b"
    pattern = re.compile(f"{whole}|{part}", re.MULTILINE)
    for path in sorted(ROOT.glob(folder)):
        if pattern.search(path.read_text(encoding="utf-8")):
            yield path
