"""Every command and code block on a page is right, or says why nobody here can run it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from tests.doc_blocks import (
    FENCED,
    REASONS,
    ROOT,
    Block,
    blocks,
    check,
    check_engine,
    check_shell,
    commands,
    engine_commands,
)
from tools import doc_references

BLOCKS = [block for page in doc_references.pages() for block in blocks(page)]
PYTHON_RUN_ELSEWHERE = {
    "README.md": "tests/test_docs.py",
    "serving.md": "tests/server/test_serving_page.py",
}
INLINE = re.compile(r"`((?:mnemosyne|python|make|pip|torchrun|pytest|\.venv/bin/\w[\w-]*) [^`]+)`")


def shell_of(block: Block) -> str | None:
    """The text of a block of commands."""
    is_shell = block.language in ("", "sh", "bash") and block.text.lstrip()[0] not in "{["
    return block.text if is_shell else None


def test_each_command_of_each_page_is_understood_by_what_would_run_it() -> None:
    texts = [(block, shell_of(block)) for block in BLOCKS if block.not_run is None]
    found = {line: str(block) for block, text in texts if text for line in commands(text)}
    for page in doc_references.pages():
        prose = FENCED.sub("", page.read_text(encoding="utf-8"))
        spoken = INLINE.findall(prose.replace("\n", " "))
        found |= {line: page.name for line in spoken if line not in found}

    assert len(found) > 50
    wrong = []
    for command, place in found.items():
        try:
            check(command)
        except (ValueError, AssertionError, SystemExit) as error:
            wrong.append(f"{place}: {command}: {error}")
    assert wrong == []


def test_what_is_not_run_says_why_and_its_commands_are_composed_all_the_same() -> None:
    left = [block for block in BLOCKS if block.not_run is not None]

    assert left
    for block in left:
        sys.stdout.write(f"{block}: not run: {block.not_run}\n")
        assert str(block.not_run).startswith(REASONS), block
        if block.language == "yaml":
            assert yaml.safe_load(block.text), block
        elif "[Unit]" not in block.text:
            check_shell(block.text)
        for words in engine_commands(block.text):
            check_engine(words)


def test_each_block_of_data_can_be_read() -> None:
    for block in BLOCKS:
        if block.not_run is None and block.text.lstrip()[0] in "{[":
            assert json.loads(block.text), block


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: str(block)
)
def test_each_block_of_python_runs_or_stands_in_a_file(block: Block) -> None:
    quoted = re.match(r"# (\S+\.py)\n", block.text)
    if block.page.name in PYTHON_RUN_ELSEWHERE:
        runner = (ROOT / PYTHON_RUN_ELSEWHERE[block.page.name]).read_text(encoding="utf-8")
        assert block.page.name in runner or "PAGES[0]" in runner
    elif quoted:
        source = (ROOT / quoted[1]).read_text(encoding="utf-8")
        lines = [line.strip() for line in block.text.splitlines()[1:]]
        assert "\n".join(lines) in "\n".join(line.strip() for line in source.splitlines())
    else:
        exec(block.text, {})  # it is our own


def test_languages_of_blocks_are_those_that_are_checked() -> None:
    known = {"", "sh", "bash", "python", "yaml", "json", "text"}

    assert {block.language for block in BLOCKS} <= known


@pytest.mark.parametrize(
    "command",
    [
        "mnemosyne serve model=x serve.hosts=0.0.0.0",
        "mnemosyne generator model=x",
        "python tools/none.py",
        "python tools/bench_mesh.py pp",
        "python tools/profile_step.py --lengths 2K",
        "make tests",
        "pip install '.[server]'",
        "pytest tests/none",
        "torchrun --nproc-per-node 2 -m mnemosyne generate model=x mesh.up=2",
        "curl http://127.0.0.1:8000 -d '{'",
        "rm -r x",
    ],
)
def test_a_wrong_command_is_noticed(command: str) -> None:
    with patch("builtins.print"), pytest.raises((ValueError, AssertionError, SystemExit)):
        check(command)


def test_blocks_are_found_fenced_and_indented(tmp_path: Path) -> None:
    page = ROOT / "docs" / "none.md"
    text = "# X\n\n    make demo  # remark\n    make test\n\n```python\nx = 1\n```\n\ntext\n"
    with patch.object(Path, "read_text", lambda *_, **__: text):
        fenced, indented = blocks(page)

    assert (fenced.language, fenced.text, fenced.line) == ("python", "x = 1\n", 6)
    assert list(commands(indented.text)) == ["make demo", "make test"]
    assert indented.line == 3
