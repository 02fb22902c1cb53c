"""A set of operators by name: the one that was asked for, or an error that says why not."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch

from mnemosyne import operators as room
from mnemosyne.config import OPERATORS
from mnemosyne.kernels.cpu.processor import AVX512, INSTRUCTION_SETS
from mnemosyne.operators import choose_operators

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RUNNING = [each.name for each in INSTRUCTION_SETS if each.why_not() is None]


@pytest.mark.parametrize("name", ["torch", *RUNNING])
def test_a_named_set_is_the_one_given(name: str) -> None:
    widths = {"width": 64, "head_dim": 32}

    chosen = choose_operators(name, device=CPU, dtype=torch.bfloat16, widths=widths)

    assert chosen.name == name
    assert chosen.can_compile == (name == "torch") == (not chosen.can_record)


def test_auto_takes_the_fastest_set_that_runs() -> None:
    fastest = next(iter(RUNNING), "torch")

    assert choose_operators("auto", device=CPU, dtype=torch.bfloat16).name == fastest
    assert choose_operators("auto", device=CPU, dtype=torch.float64).name == "torch"
    assert choose_operators("auto", device=CUDA, dtype=torch.bfloat16).name == "torch"


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError,
        match="operators must be one of auto, torch, amx, avx512, avx512f, avx2, neon, got 'blas'",
    ):
        choose_operators("blas", device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        choose_operators("touch", device=CPU, dtype=torch.float32)


def test_a_set_that_cannot_run_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    able = replace(AVX512, flags=())
    lacking = replace(AVX512, name="amx", flags=("amx_of_tomorrow",))
    monkeypatch.setattr(room, "INSTRUCTION_SETS", (lacking, able))
    half = {"dtype": torch.bfloat16}

    for name, choices, said in (
        ("avx512", {"device": CPU, "dtype": torch.float32}, "it computes in bfloat16, not torch.f"),
        ("avx512", {"device": CUDA, **half}, "it computes on cpu, not cuda"),
        ("avx512", {"device": CPU, "widths": {"head_dim": 48}, **half}, "32 elements, and head_d"),
        ("amx", {"device": CPU, **half}, "this processor lacks amx_of_tomorrow"),
    ):
        with pytest.raises(
            ValueError, match=f"^operators={name} must be able to run, but"
        ) as error:
            choose_operators(name, **choices)
        assert said in str(error.value)
        assert str(error.value).endswith("; use operators=torch")


def test_every_instruction_set_can_be_named() -> None:
    assert set(OPERATORS) == {"auto", "torch", *(each.name for each in INSTRUCTION_SETS)}


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(room).attempted > 3
    assert doctest.testmod(room).failed == 0
