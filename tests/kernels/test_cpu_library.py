"""Kernels that cannot be built are a reason to say, not an end of the program."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mnemosyne import attention
from mnemosyne.attention import choose_backend
from mnemosyne.kernels.cpu import library, processor
from mnemosyne.kernels.cpu.processor import AMX, AVX512

pytestmark = pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not()))


CACHED = (
    processor._why_not,
    library.load_library,
    library.find_compiler,
    library._usable,
    library._temporary,
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
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should go")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))

    assert usual_backend() == "cpu"

    assert "set XDG_CACHE_HOME" in caplog.text


def test_auto_takes_the_kernels_where_they_can_be_built() -> None:
    usual = "avx512" if AMX.why_not() else "amx"

    assert usual_backend() == usual


def test_amx_is_not_used_where_the_system_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = replace(AMX, flags=(), permission=lambda: "the system does not let it")
    monkeypatch.setattr(attention, "INSTRUCTION_SETS", (refused, AVX512))

    assert usual_backend() == "avx512"

    with pytest.raises(ValueError, match="amx must be able to run, but the system does not let it"):
        choose_backend("amx", device=torch.device("cpu"), dtype=torch.bfloat16, head_dim=64)


def test_a_set_that_the_processor_lacks_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(AMX, flags=("amx_of_tomorrow",))
    monkeypatch.setattr(attention, "INSTRUCTION_SETS", (lacking, AVX512))

    assert usual_backend() == "avx512"
    assert lacking.why_not() == "this processor lacks amx_of_tomorrow"


def test_a_set_of_another_architecture_is_passed_over() -> None:
    elsewhere = replace(AVX512, machine="aarch64")

    assert elsewhere.why_not() == "they run on Linux aarch64, this is Linux x86_64"


def test_a_set_needs_what_the_set_it_extends_needs() -> None:
    lacking = replace(AVX512, flags=("avx_of_tomorrow",))

    assert replace(AMX, extends=lacking).why_not() == "this processor lacks avx_of_tomorrow"
