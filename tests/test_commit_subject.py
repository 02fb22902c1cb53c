"""The hook lets good subjects of commits pass, and says what is wrong with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools.commit_subject import why_refused

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "subject",
    [
        "schedule: count the steps in flight in slack",
        "model_zoo, operators: begin comments with a noun",
        "README, docs: process what readers need",
        "tests/server: pass a key",
        "all rooms: split the functions of more than fifty lines",
        'Revert "cache: keep long prefixes on disk"',
        "fixup! cache: keep",
        "x: keep " + "y" * 64,
    ],
)
def test_a_subject_that_follows_the_rules_passes(subject: str) -> None:
    assert why_refused(subject) is None


@pytest.mark.parametrize(
    ("subject", "why"),
    [
        ("x: keep " + "y" * 65, "at most 72 characters, got 73"),
        ("x", "must read 'area: imperative'"),
        ("", "must read 'area: imperative'"),
        ("Keep a file", "must read 'area: imperative'"),
        ("docs: pages for kernels", "an imperative after the area, got 'pages'"),
        ("cache: adds a level", "got 'adds'"),
        ("cache: added a level", "got 'added'"),
        ("cache: adding a level", "got 'adding'"),
        ("cache: the level on disk", "got 'the'"),
        ("cache: what is kept", "got 'what'"),
        ("cache: keep a level.", "without a full stop"),
    ],
)
def test_a_subject_that_breaks_a_rule_is_refused_with_that_rule(subject: str, why: str) -> None:
    refused = why_refused(subject)

    assert refused is not None
    assert why in refused


def test_the_hook_reads_the_file_of_git_without_its_remarks(tmp_path: Path) -> None:
    message = tmp_path / "COMMIT_EDITMSG"
    message.write_text("# remark\ncache: adds a level\n\nwhy\n")

    done = subprocess.run(
        [sys.executable, "tools/commit_subject.py", str(message)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stderr.startswith("the subject must begin with an imperative")


def test_the_hook_is_installed_with_the_others() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")

    assert "default_install_hook_types: [pre-commit, commit-msg]" in hooks
    assert "entry: python tools/commit_subject.py" in hooks
