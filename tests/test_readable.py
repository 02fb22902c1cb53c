"""Files and functions are no longer than a reader bears, and begin by naming what they are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("mnemosyne", "model_zoo", "kernels", "tools")
MAX_FILE_LINES = 350
NO_NOUNS = ("What", "Whether", "Who", "Whose")  # a summary begins with a noun or a verb
MAX_FUNCTION_LINES = 50  # docstrings left out; bodies of kernels are excepted


def sources(*rooms: str) -> Iterator[Path]:
    """Each file once: some rooms are links to others."""
    found = {path.resolve() for room in rooms or ROOMS for path in (ROOT / room).rglob("*.py")}
    yield from sorted(found)


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of each function, its docstring left out."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            first = node.body[0]
            has_text = ast.get_docstring(node, clean=False) is not None
            text_lines = (first.end_lineno or 0) - first.lineno + 1 if has_text else 0
            yield node.name, node.end_lineno - node.lineno + 1 - text_lines


def test_no_file_is_longer_than_350_lines() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}

    assert len(lines) > 200
    assert {str(path): n for path, n in lines.items() if n > MAX_FILE_LINES} == {}


def test_no_function_outside_kernels_is_longer_than_50_lines() -> None:
    long = [
        f"{path}: {name} has {num_lines} lines"
        for path in sources()
        if (ROOT / "kernels") not in path.parents
        for name, num_lines in functions_of(path)
        if num_lines > MAX_FUNCTION_LINES
    ]

    assert long == []


def summaries_of(path: Path) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "its first line"), text


def test_no_summary_begins_with_what_whether_or_who() -> None:
    wrong = [
        f"{path}: {name}: {text.splitlines()[0]}"
        for path in sources(*ROOMS, "tests")
        for name, text in summaries_of(path)
        if text.split()[0] in NO_NOUNS
    ]

    assert wrong == []
