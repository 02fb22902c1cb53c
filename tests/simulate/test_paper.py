"""The page of the paper's figures says what the runs gave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WRITE = """
import json, sys
from pathlib import Path
sys.path.insert(0, "tools/paper")
from page import write_page
write_page(json.loads(Path("docs/paper/results.json").read_text()), Path(sys.argv[1]))
"""


def test_the_page_is_written_from_the_results_beside_it(tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()

    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    page = (tmp_path / "paper.md").read_text()
    assert page == (ROOT / "docs" / "paper.md").read_text()
    commits = json.loads((ROOT / "docs" / "paper" / "results.json").read_text())["commits"]
    assert all(commit in page for commit in commits.values())
    drawn = {path.name for path in (tmp_path / "paper").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "paper").glob("*.png")}


RUN = """
import json, sys
sys.path.insert(0, "tools/paper")
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("paper", "tools/paper/__main__.py")
paper = module_from_spec(spec)
spec.loader.exec_module(paper)
jobs = {name: (function, arguments) for name, function, arguments in paper.jobs()}
rows = dict(paper.run((name, *jobs[name])) for name in sys.argv[1:])
print(json.dumps({"rows": rows, "names": list(jobs)}))
"""
ROWS = (  # seconds each; every stage count, groups, a chunk rule beside a decode, a cost alone
    "alone/llama3_8b/1048576/1",
    "alone/llama3_8b/1048576/8",
    "alone/llama3_8b/1048576/16",
    "alone/llama3_70b/1048576/16",
    "tpot/llama3_8b/4194304/4",
    "static/2048",
    "adaptive/0.03",
    "cp/llama3_8b/1048576",
    "attention",
)


def test_rows_of_the_results_come_out_again() -> None:
    """A change to the scheduler or the costs that moves the page needs ``make paper``."""
    before = json.loads((ROOT / "docs" / "paper" / "results.json").read_text())

    done = subprocess.run(
        [sys.executable, "-c", RUN, *ROWS], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert before["commits"].keys() == set(told["names"]), "each row says which code it is of"
    for name, now in told["rows"].items():
        assert _numbers(now) == pytest.approx(_numbers(before[name]), rel=1e-3), name


def _numbers(tree: object) -> list[float]:
    """All numbers of a result, in the order of their names."""
    if isinstance(tree, dict):
        return [number for name in sorted(tree) for number in _numbers(tree[name])]
    if isinstance(tree, list):
        return [number for part in tree for number in _numbers(part)]
    assert isinstance(tree, bool | int | float)
    return [float(tree)]
