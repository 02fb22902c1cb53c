"""Operators of a model between two attentions: one contract, chosen once for the decoder.

>>> import torch
>>> operators = choose_operators("torch", device=torch.device("cpu"), dtype=torch.float64)
>>> x_TE, weight_NE = torch.randn(3, 8).double(), torch.randn(4, 8).double()
>>> (y_TN,) = operators.linear(x_TE, [(weight_NE, None)])
>>> y_TN.shape
torch.Size([3, 4])
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches

import torch

from mnemosyne.config import OPERATORS
from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS, InstructionSet
from mnemosyne.operators.contract import ExpertWeights, Operators, Rotary, Weights
from mnemosyne.operators.native import VECTOR, NativeOperators
from mnemosyne.operators.of_torch import CLAMP, SWISH, TORCH, TorchOperators, activate

__all__ = [
    "CLAMP",
    "SWISH",
    "TORCH",
    "ExpertWeights",
    "NativeOperators",
    "Operators",
    "Rotary",
    "TorchOperators",
    "Weights",
    "activate",
    "choose_operators",
]

log = logging.getLogger(__name__)


def choose_operators(
    name: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    widths: Mapping[str, int] | None = None,
) -> Operators:
    """A set by name; one that cannot run there is refused, never replaced.

    Args:
        name: ``torch``, an instruction set of the C++ kernels, or ``auto``: on CPU the
            fastest instruction set that runs here and takes the dtype, else ``torch``.
        device: where the model computes.
        dtype: of weights and activations.
        widths: by name, the row lengths that a named set must be able to take.

    Raises:
        ValueError: if there is no such set, or it does not run on the device, dtype, processor or
            widths.
    """
    if name not in OPERATORS:
        close = get_close_matches(name, OPERATORS, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "auto picks by device and dtype"
        raise ValueError(f"operators must be one of {', '.join(OPERATORS)}, got {name!r}; {remedy}")
    if name == "torch":
        return TorchOperators()
    if name == "auto":
        return _usual(device, dtype)
    (instructions,) = (each for each in INSTRUCTION_SETS if each.name == name)
    if (why_not := _why_not(instructions, device, dtype, widths or {})) is not None:
        raise ValueError(
            f"operators={name} must be able to run, but {why_not}; use operators=torch"
        )
    return NativeOperators(instructions)


def _usual(device: torch.device, dtype: torch.dtype) -> Operators:
    for instructions in INSTRUCTION_SETS:
        if _why_not(instructions, device, dtype, {}) is None:
            return NativeOperators(instructions)
    return TorchOperators()


def _why_not(
    instructions: InstructionSet,
    device: torch.device,
    dtype: torch.dtype,
    widths: Mapping[str, int],
) -> str | None:
    if device.type != "cpu":
        return f"it computes on cpu, not {device}"
    if (why_not := instructions.why_not_in(dtype)) is not None:
        return why_not
    for width, size in widths.items():
        if size % VECTOR:
            return f"it takes rows of multiples of {VECTOR} elements, and {width} is {size}"
    return instructions.why_not()
