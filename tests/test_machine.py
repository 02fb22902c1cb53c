"""Questions about the machine are asked in one place, and a missing home stops nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mnemosyne import machine
from mnemosyne.machine import cache_folder, instructions, is_private, num_cores, processor_name

CPUINFO = "processor\t: 0\nmodel name\t: Abacus 1\nflags\t\t: sse2 amx_tile avx512f\n\n"


def test_the_processor_is_named_with_its_instructions(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(CPUINFO)

    assert processor_name(tmp_path) == "Abacus 1"
    assert instructions(tmp_path) == ("amx_tile", "avx512f", "sse2")


def test_a_system_that_does_not_describe_its_processor_gives_a_name_all_the_same(
    tmp_path: Path,
) -> None:
    assert processor_name(tmp_path)
    assert instructions(tmp_path) == ()


def test_cores_are_those_that_this_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_the_cache_folder_is_made_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "mnemosyne").mkdir(parents=True, mode=0o777)
    (tmp_path / "cache" / "mnemosyne").chmod(0o777)

    folder = cache_folder("things")

    assert folder == tmp_path / "cache" / "mnemosyne" / "things"
    assert is_private(folder)
    assert is_private(folder.parent)


def test_the_cache_folder_is_that_of_the_home_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder("x") == tmp_path / ".cache" / "mnemosyne" / "x"


@pytest.mark.parametrize("reason", ["no home", "a file", "of somebody else", "read-only"])
def test_a_temporary_folder_stands_in_for_a_home_that_cannot_be_used_and_that_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / reason))
    if reason == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif reason == "a file":
        (tmp_path / reason).touch()
    elif reason == "of somebody else":
        monkeypatch.setattr(machine, "is_private", lambda path: False)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    machine._usable.cache_clear()

    folders = [cache_folder("things") for _ in range(2)]

    assert folders[0] == folders[1]
    assert tmp_path not in folders[0].parents
    assert folders[0].is_dir()
    assert folders[0].parent.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count("no files are kept for the next start") == 1
