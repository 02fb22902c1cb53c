"""Every instruction set of the C++ kernels in each of its dtypes, for tests over all of them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS, InstructionSet


class Kernels(NamedTuple):
    """The kernels of a set in one dtype."""

    instructions: InstructionSet
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.instructions.name}-{str(self.dtype).removeprefix('torch.')}"


ALL = [Kernels(each, dtype) for each in INSTRUCTION_SETS for dtype in each.dtypes]


def runnable(kernels: Kernels) -> Kernels:
    """The same, or the test is skipped with the reason why they cannot run here."""
    if (why_not := kernels.instructions.why_not()) is not None:
        pytest.skip(f"{kernels}: {why_not}")
    return kernels
