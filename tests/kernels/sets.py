"""Every instruction set of the C++ kernels in each of its dtypes, for tests over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch

from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS, InstructionSet
from tests.kernels.emulated import EMULATED_NEON, Emulated


class Kernels(NamedTuple):
    """The kernels of a set in one dtype."""

    instructions: InstructionSet
    dtype: torch.dtype

    @property
    def is_emulated(self) -> bool:
        """Tell if computing takes them fifty times as long."""
        return isinstance(self.instructions, Emulated)

    def some(self, sizes: Sequence[int]) -> Sequence[int]:
        """The sizes to try: all, or a few with every remainder by 6 (rows of a product)."""
        return sizes[::37] if self.is_emulated else sizes

    def __str__(self) -> str:
        return f"{self.instructions.name}-{str(self.dtype).removeprefix('torch.')}"


INSTRUCTIONS = (*INSTRUCTION_SETS, EMULATED_NEON)
ALL = [Kernels(each, dtype) for each in INSTRUCTIONS for dtype in each.dtypes]


def skip_if_emulated(instructions: InstructionSet) -> None:
    """Skip a case that takes an emulator too long; others prove the same of it."""
    if isinstance(instructions, Emulated):
        pytest.skip(f"{instructions.name}: it takes an emulator too long")


def runnable(kernels: Kernels) -> Kernels:
    """The same, or the test is skipped with the reason why they cannot run here."""
    if (why_not := kernels.instructions.why_not()) is not None:
        pytest.skip(f"{kernels}: {why_not}")
    return kernels
