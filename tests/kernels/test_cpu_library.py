"""Kernels that cannot be built are a reason to say, not an end of the program."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mnemosyne.attention import choose_backend
from mnemosyne.kernels.cpu import library

pytestmark = pytest.mark.skipif(
    library.what_is_missing() is not None, reason=str(library.what_is_missing())
)


CACHED = (
    library.what_is_missing,
    library.what_is_missing_for_tiles,
    library.load_library,
    library._compiler,
)


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing built yet, and nothing remembered of what the test made up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


def usual_backend() -> str:
    device = torch.device("cpu")
    return choose_backend("auto", device=device, dtype=torch.bfloat16, head_dim=64).name


def test_auto_does_without_a_compiler_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho unknown flag >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    assert usual_backend() == "cpu"

    assert "install g++ 11 or newer" in caplog.text
    assert "unknown flag" in caplog.text
    with pytest.raises(ValueError, match=r"avx512 must be able to run, but .* cannot"):
        choose_backend("avx512", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=64)


def test_auto_does_without_a_folder_that_cannot_be_made(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should go")

    assert usual_backend() == "cpu"

    assert "make it writable" in caplog.text


def test_auto_takes_the_kernels_where_they_can_be_built() -> None:
    usual = "avx512" if library.what_is_missing_for_tiles() else "amx"

    assert usual_backend() == usual


@pytest.mark.skipif(
    library.what_is_missing_for_tiles() is not None, reason=str(library.what_is_missing_for_tiles())
)
def test_auto_does_without_tiles_that_the_system_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_allow_tiles", lambda: False)

    assert usual_backend() == "avx512"

    with pytest.raises(ValueError, match="the system does not let this process use AMX"):
        choose_backend("amx", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=64)


def test_auto_does_without_tiles_on_a_processor_that_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "TILES", ("amx_of_tomorrow",))

    assert usual_backend() == "avx512"
    assert library.what_is_missing_for_tiles() == "this processor lacks amx_of_tomorrow"
