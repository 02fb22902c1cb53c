"""The page of the paper's figures says what the runs gave."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
    assert (tmp_path / "paper.md").read_text() == (ROOT / "docs" / "paper.md").read_text()
    drawn = {path.name for path in (tmp_path / "paper").iterdir()}
    assert drawn == {path.name for path in (ROOT / "docs" / "paper").glob("*.png")}
