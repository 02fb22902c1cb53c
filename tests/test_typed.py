"""The public names are typed as strictly as a user may ask."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mnemosyne

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "tests" / "public_names.py"
# Packages whose sources mypy would read for minutes, and that no public name speaks of.
CONFIG = """
[mypy]
strict = true
follow_imports = silent
[mypy-torch.*,transformers.*,triton.*,tokenizers.*,jinja2.*,rich.*,zmq.*,safetensors.*,gguf.*]
follow_imports = skip
ignore_missing_imports = true
"""
WRONG = """
from mnemosyne import LLM, SamplingParams

text: int = LLM("needle").generate("x")[0].text
LLM("needle", devise="cpu")
"""


def test_a_program_with_all_public_names_passes_mypy_strict_and_a_wrong_one_does_not(
    tmp_path: Path,
) -> None:
    config, wrong = tmp_path / "mypy.ini", tmp_path / "wrong.py"
    config.write_text(CONFIG)
    wrong.write_text(WRONG)
    options = ["--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]

    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(PROGRAM), str(wrong)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    errors = [line for line in done.stdout.splitlines() if " error: " in line]
    assert [line.split(":")[1] for line in errors] == ["4", "5"], done.stdout + done.stderr
    assert all(Path(line.split(":")[0]).name == "wrong.py" for line in errors)


def test_the_program_names_all_that_is_public() -> None:
    source = PROGRAM.read_text(encoding="utf-8")

    assert [name for name in mnemosyne.__all__ if source.count(name) < 2] == []
    assert (Path(mnemosyne.__file__).parent / "py.typed").is_file()
