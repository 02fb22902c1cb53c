"""A library of an earlier start is loaded as it was written, or compiled again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mnemosyne.kernels.cpu import library
from mnemosyne.kernels.cpu.processor import AVX512

pytestmark = pytest.mark.skipif(
    AVX512.why_not() is not None,
    reason="needs a C++ compiler on Linux",
)
CACHED = (library.load_library, library._usable, library._temporary)


@pytest.fixture(autouse=True)
def _nothing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not" / "there" / "cache"))
    forget()
    yield
    forget()


def forget() -> None:
    for cached in CACHED:
        cached.cache_clear()


def start(monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int]:
    """The library that a start loads, and how many it compiled."""
    compiled, loaded = [], []
    compile_one, load_one = library._compile, library.ctypes.CDLL
    with monkeypatch.context() as patch:
        patch.setattr(library, "_compile", lambda *a: (compiled.append(a), compile_one(*a)))
        patch.setattr(
            library.ctypes, "CDLL", lambda *a, **k: (loaded.append(a[0]), load_one(*a, **k))[1]
        )
        forget()
        library.load_library("tape")
    return Path(loaded[-1]), len(compiled)


def flip(content: bytes) -> bytes:
    third = len(content) // 3
    return (
        content[:third] + bytes(b ^ 0xFF for b in content[third : 2 * third]) + content[2 * third :]
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        flip,
    ],
    ids=["empty", "half", "one byte lost", "one byte more", "altered"],
)
def test_a_damaged_library_is_compiled_again_and_that_is_said(
    change: Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, _ = start(monkeypatch)
    whole = path.read_bytes()
    path.unlink()  # this process has it loaded
    path.write_bytes(change(whole))
    path.chmod(0o700)

    counts = [start(monkeypatch)[1] for _ in range(2)]

    assert counts == [1, 0]
    assert path.read_bytes() == whole
    assert caplog.text.count("is compiled again: it is not as it was written") == 1


def test_a_library_that_others_can_write_is_compiled_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, _ = start(monkeypatch)
    path.chmod(0o777)

    assert start(monkeypatch)[1] == 1
    assert path.stat().st_mode & 0o777 == 0o700
    assert "other users can write to it" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("level", [0, 1, 2], ids=["file", "folder", "folder above"])
def test_a_library_of_another_user_is_not_loaded(
    level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = start(monkeypatch)
    os.chown([path, *path.parents][level], 12345, 12345)

    loaded, num_compiled = start(monkeypatch)

    assert num_compiled == 1
    assert loaded.stat().st_uid == 0
    assert loaded.parent.stat().st_uid == 0
    assert (loaded == path) is (level == 0)


def test_the_folder_of_libraries_is_closed_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = start(monkeypatch)
    for folder in (path.parent, path.parent.parent):
        folder.chmod(0o777)

    start(monkeypatch)

    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.parent.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("reason", ["no home", "a file"])
def test_without_a_folder_for_libraries_each_start_compiles_its_own_and_says_so(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if reason == "a file":
        folder = tmp_path / "not" / "there"
        folder.mkdir(parents=True)
        (folder / "cache").touch()
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))

    path, num_compiled = start(monkeypatch)

    assert num_compiled == 1
    assert tmp_path not in path.parents
    assert caplog.text.count("kernels are compiled at each start") == 1


def test_a_library_that_needs_an_openmp_of_its_own_has_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_torch, _ = start(monkeypatch)
    monkeypatch.setattr(library, "_share_openmp", lambda: False)

    alone, num_compiled = start(monkeypatch)

    assert num_compiled == 1
    assert alone != with_torch


def test_the_first_build_of_a_library_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = library.find_compiler()
    assert compiler is not None
    monkeypatch.setattr(library, "library_folder", lambda: tmp_path)
    monkeypatch.setattr(library, "_compile", lambda *_: None)
    caplog.set_level("INFO")

    library.build_library(compiler, "tape")

    assert caplog.text.count("for this processor, once") == 1
