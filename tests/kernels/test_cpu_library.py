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


@pytest.fixture(autouse=True)
def _forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing built yet, and nothing remembered of what the test made up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (library.what_is_missing, library.load_library, library._compiler):
        cached.cache_clear()
    yield
    for cached in (library.what_is_missing, library.load_library, library._compiler):
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
    assert usual_backend() == "avx512"
