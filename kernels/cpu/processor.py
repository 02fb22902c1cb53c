"""Instruction sets that the C++ kernels are written for, as values: what each takes to run."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Self

import torch

from mnemosyne.kernels.cpu.library import find_compiler, load_library, processor_flags

# Of a dtype, as the C++ sources name it: its bits, but for bfloat16.
ELEMENTS = {torch.bfloat16: 17, torch.float16: 16, torch.float32: 32}

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # of Linux on x86_64


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class InstructionSet:
    """Instructions of a processor, and the kernels written for them.

    Compared by identity: each set exists once, and kernels are cached by it.
    """

    name: str
    machine: str  # as the system calls the architecture
    flags: tuple[str, ...]  # that /proc/cpuinfo must list
    compiler_flags: tuple[str, ...]
    linear: str  # source of the products
    attention: str  # source of attention
    rows: str  # source of all else
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)  # of weights, activations and cache
    most_rows: int | None = None  # for which its products are faster than torch's; None: any
    extends: Self | None = None  # a set whose requirements are this one's too
    permission: Callable[[], str | None] | None = None  # asks the system; why it refuses

    def why_not(self) -> str | None:
        """Why these kernels cannot run here, None if they can; the first call may compile."""
        return _why_not(self)

    def why_not_in(self, dtype: torch.dtype) -> str | None:
        """Why these kernels cannot take a dtype, None if they can."""
        if dtype in self.dtypes:
            return None
        known = " and ".join(str(each).removeprefix("torch.") for each in self.dtypes)
        return f"it computes in {known}, not {dtype}"

    def load(self, source: str, dtype: torch.dtype, **constants: int) -> ctypes.CDLL:
        """The library of one source for one of ``dtypes`` (see ``load_library``)."""
        assert dtype in self.dtypes
        return load_library(source, self.compiler_flags, ELEMENT=ELEMENTS[dtype], **constants)


@cache
def _why_not(instructions: InstructionSet) -> str | None:
    if instructions.extends is not None and (why_not := instructions.extends.why_not()) is not None:
        return why_not
    if platform.system() != "Linux" or platform.machine() != instructions.machine:
        here = f"{platform.system()} {platform.machine()}"
        return f"they run on Linux {instructions.machine}, this is {here}"
    lacking = [flag for flag in instructions.flags if flag not in processor_flags()]
    if lacking:
        return f"this processor lacks {', '.join(lacking)}"
    if instructions.permission is not None and (why_not := instructions.permission()) is not None:
        return why_not
    return _why_not_built(instructions)


def _why_not_built(instructions: InstructionSet) -> str | None:
    """Why the kernels cannot be compiled or kept; one of them is tried."""
    compiler = find_compiler()
    if compiler is None:
        return "there is no C++ compiler; install g++"
    try:
        instructions.load(instructions.linear, instructions.dtypes[0])
    except RuntimeError as error:  # a compiler older than the processor, most likely
        return f"{compiler} cannot build them, see below; install g++ 11 or newer\n{error}"
    except OSError as error:
        return f"no library can be kept ({error}); set XDG_CACHE_HOME to a folder of yours"
    return None


def allow_amx() -> str | None:
    """Ask for the registers of AMX, for all threads of this process; why it is refused."""
    granted = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0
    if granted:
        return None
    return "the system does not let this process use AMX; it takes Linux 5.16 or newer"


AVX512 = InstructionSet(
    name="avx512",
    machine="x86_64",
    flags=("avx512f", "avx512bw", "avx512vl", "avx512_bf16"),
    compiler_flags=("-march=native",),
    linear="linear",
    attention="attention_avx512",
    rows="rows",
    most_rows=64,
)
AMX = InstructionSet(
    name="amx",
    machine="x86_64",
    flags=("amx_tile", "amx_bf16"),
    compiler_flags=("-march=native",),
    linear="linear_amx",
    attention="attention_amx",
    rows="rows",
    extends=AVX512,
    permission=allow_amx,
)
# The sets below widen elements in registers: any dtype, on processors without bfloat16 products.
AVX512F = InstructionSet(
    name="avx512f",
    machine="x86_64",
    flags=("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    compiler_flags=("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    linear="linear_vector",
    attention="attention_vector",
    rows="rows",
    dtypes=tuple(ELEMENTS),
)
AVX2 = InstructionSet(
    name="avx2",
    machine="x86_64",
    flags=("avx2", "fma", "f16c"),
    compiler_flags=("-mavx2", "-mfma", "-mf16c"),
    linear="linear_vector",
    attention="attention_vector",
    rows="rows",
    dtypes=tuple(ELEMENTS),
)
NEON = InstructionSet(
    name="neon",
    machine="aarch64",
    flags=("asimd",),
    compiler_flags=("-march=armv8-a",),
    linear="linear_vector",
    attention="attention_vector",
    rows="rows",
    dtypes=tuple(ELEMENTS),
)
INSTRUCTION_SETS = (AMX, AVX512, AVX512F, AVX2, NEON)  # of a machine the fastest first
