"""A backend by name: the one that was asked for, or an error that says why not."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mnemosyne import attention
from mnemosyne.attention import choose_backend
from mnemosyne.config import ATTENTION_BACKENDS, CPU_KERNELS
from mnemosyne.kernels.cpu import processor
from mnemosyne.kernels.cpu.processor import AMX, AVX512, INSTRUCTION_SETS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["cpu", "flex", "reference", "triton"])
def test_a_named_backend_is_the_one_given(name: str) -> None:
    assert choose_backend(name, device=CPU, dtype=torch.bfloat16, head_dim=64).name == name


def test_auto_goes_by_the_device() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        able = [s.name for s in INSTRUCTION_SETS if s.why_not() is None and dtype in s.dtypes]
        usual = next(iter(able), "cpu")
        assert choose_backend("auto", device=CPU, dtype=dtype, head_dim=64).name == usual
    assert choose_backend("auto", device=CPU, dtype=torch.bfloat16, head_dim=48).name == "cpu"
    assert choose_backend("auto", device=CUDA, dtype=torch.float32, head_dim=64).name == "triton"
    assert choose_backend("auto", device=CUDA, dtype=torch.float32, head_dim=512).name == "flex"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match="attention must be one of auto, reference, flex, triton, cpu, amx, avx512, avx512f",
    ):
        choose_backend("dense", device=CPU, dtype=torch.float32, head_dim=64)
    with pytest.raises(ValueError, match="did you mean 'flex'"):
        choose_backend("felx", device=CPU, dtype=torch.float32, head_dim=64)


def test_a_backend_that_cannot_run_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device must be cpu for attention=cpu, got cuda"):
        choose_backend("cpu", device=CUDA, dtype=torch.float32, head_dim=64)
    with pytest.raises(ValueError, match="avx512 must be able to run, but it computes in bfloat16"):
        choose_backend("avx512", device=CPU, dtype=torch.float32, head_dim=64)
    with pytest.raises(ValueError, match="amx must be able to run, but it computes in bfloat16"):
        choose_backend("amx", device=CPU, dtype=torch.float32, head_dim=64)
    with pytest.raises(ValueError, match="device must be cpu for attention=amx, got cuda"):
        choose_backend("amx", device=CUDA, dtype=torch.bfloat16, head_dim=64)
    with pytest.raises(ValueError, match="multiples of 32 up to 256, not 48; use attention=cpu"):
        choose_backend("avx512", device=CPU, dtype=torch.bfloat16, head_dim=48)
    with pytest.raises(ValueError, match="device must be cpu or cuda for attention=auto, got mps"):
        choose_backend("auto", device=torch.device("mps"), dtype=torch.float32, head_dim=64)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match=r"device must be cuda \(or cpu under TRITON_INTERPRET=1\)"
    ):
        choose_backend("triton", device=CPU, dtype=torch.float32, head_dim=64)

    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"triton must be installed for attention=triton"):
        choose_backend("triton", device=CUDA, dtype=torch.float32, head_dim=64)


@pytest.mark.parametrize("name", ["cpu", "flex", "triton"])
def test_a_dtype_that_the_backend_lacks_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got torch.float8_e4m3fn"):
        choose_backend(name, device=CPU, dtype=torch.float8_e4m3fn, head_dim=64)
    with pytest.raises(ValueError, match="dtype must be a floating one"):
        choose_backend("reference", device=CPU, dtype=torch.int8, head_dim=64)


@pytest.fixture
def _asks_again() -> Iterator[None]:
    """Forget what a test makes up of the machine."""
    processor._why_not.cache_clear()
    yield
    processor._why_not.cache_clear()


@pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not()))
@pytest.mark.usefixtures("_asks_again")
def test_auto_says_what_it_could_not_choose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processor, "find_compiler", lambda: None)

    backend = choose_backend("auto", device=CPU, dtype=torch.bfloat16, head_dim=64)

    assert backend.name == "cpu"
    assert "not the faster avx2: there is no C++ compiler" in caplog.text


@pytest.mark.usefixtures("_asks_again")
def test_auto_speaks_of_sets_of_this_machine_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(processor, "processor_flags", lambda: frozenset({"fp"}))

    backend = choose_backend("auto", device=CPU, dtype=torch.float16, head_dim=64)

    assert backend.name == "cpu"
    assert "not the faster neon: this processor lacks asimd" in caplog.text


@pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not()))
def test_auto_does_without_amx_and_a_name_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    refusing = replace(AMX, flags=(), permission=lambda: "the system does not let it")
    monkeypatch.setattr(attention, "INSTRUCTION_SETS", (refusing, AVX512))

    backend = choose_backend("auto", device=CPU, dtype=torch.bfloat16, head_dim=64)

    assert backend.name == "avx512"
    assert "attention is avx512, not amx: the system does not let it" in caplog.text
    with pytest.raises(
        ValueError, match=r"amx must be able to run, but the system .*; use attention=cpu"
    ):
        choose_backend("amx", device=CPU, dtype=torch.bfloat16, head_dim=64)


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(attention).attempted > 5
    assert doctest.testmod(attention).failed == 0


def test_each_instruction_set_has_a_backend_of_its_name() -> None:
    assert {each.name for each in INSTRUCTION_SETS} == set(CPU_KERNELS) <= set(ATTENTION_BACKENDS)
