"""Figures on pages for readers are those that were written down when they were measured."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tools import gpu_tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
LOG = ROOT / "docs" / "performance" / "log.md"
H200 = ROOT / "benchmarks" / "gpu" / "h200.json"
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?")
COMMIT = re.compile(r"\b[0-9a-f]{7}\b")


def numbers_in(text: str) -> list[str]:
    return [found.rstrip(",").replace(",", "") for found in NUMBER.findall(text)]


def tables_of(page: Path) -> list[str]:
    """Cells of a page's tables, their first column and their commits left out."""
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    return [COMMIT.sub("", cell) for row in rows for cell in row.split("|")[2:]]


def is_among(number: str, known: list[float]) -> bool:
    """Tell if a number is one of those known, or one of them rounded."""
    digits = len(number.partition(".")[2])
    return any(abs(float(number) - value) <= 0.5 * 10**-digits + 1e-9 for value in known)


@pytest.mark.parametrize(
    ("page", "sources"), [(PAGE, [LOG, H200]), (ROOT / "README.md", [PAGE])], ids=["page", "README"]
)
def test_every_figure_of_a_table_stands_in_its_source(page: Path, sources: list[Path]) -> None:
    known = [float(n) for path in sources for n in numbers_in(path.read_text(encoding="utf-8"))]
    text = gpu_tables.with_tables(PAGE.read_text(encoding="utf-8"), "") if page == PAGE else ""

    cells = [cell for cell in tables_of(page) if not text or cell in text]
    shown = [number for cell in cells for number in numbers_in(cell)]

    assert len(shown) > 20
    assert [number for number in shown if not is_among(number, known)] == []


def test_a_changed_figure_is_noticed() -> None:
    known = [float(n) for n in numbers_in(LOG.read_text(encoding="utf-8"))]

    assert is_among("122.7", known)
    assert not is_among("122.9", known)


def test_the_tables_of_the_gpu_are_those_that_the_tool_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")

    made = gpu_tables.with_tables(page, gpu_tables.tables_of(H200))

    assert made == page, "run: python tools/gpu_tables.py --write docs/performance.md"


def test_each_commit_named_on_the_page_is_one_of_the_project() -> None:
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run(
        [*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True
    )
    if shallow.stdout.strip() != "false":
        pytest.skip("the history of the project is not here")

    names = set(COMMIT.findall(PAGE.read_text(encoding="utf-8")))

    assert len(names) >= 6
    for name in names:
        assert subprocess.run([*git, "cat-file", "-e", f"{name}^{{commit}}"]).returncode == 0, name
