"""Kernels compiled for another machine, and run in its emulator on the tensors of this process.

Python copies what a call points to into memory that it shares with the emulator, has the kernel
called there, and copies everything back.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mnemosyne.kernels.cpu.library import build_library
from mnemosyne.kernels.cpu.processor import ELEMENTS, NEON, InstructionSet

COMPILER = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")
SYSTEM = "/usr/aarch64-linux-gnu"  # where the compiler's package has the libraries of the machine

_SIZE = 12 << 30  # of the shared memory; takes no room before it is written
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LEAST_ADDRESS = 1 << 32  # no test counts as many of anything


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Emulated(InstructionSet):
    """A set of another machine, which its emulator runs."""

    def why_not(self) -> str | None:
        """Why it cannot be emulated here, None if it can."""
        if platform.system() != "Linux":
            return "it is emulated on Linux alone"
        if platform.machine() == self.machine:
            return "this machine runs the set itself"
        if shutil.which(COMPILER) is None:
            return f"there is no {COMPILER}; install g++-aarch64-linux-gnu"
        if _find_emulator() is None:
            return f"there is no {EMULATORS[0]}; install qemu-user-static"
        return None

    def load(self, source: str, dtype: torch.dtype, **constants: int) -> Any:
        """Stand-in for the library of a source, whose functions are called elsewhere."""
        defines = {"ELEMENT": ELEMENTS[dtype], **constants}
        return _Library(build_library(COMPILER, source, self.compiler_flags, **defines))


EMULATED_NEON = Emulated(
    **{field.name: getattr(NEON, field.name) for field in fields(NEON)} | {"name": "emulated_neon"}
)


class _Library:
    """Functions of a library by their names, like ``ctypes.CDLL``."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __getattr__(self, name: str) -> _Kernel:
        kernel = _Kernel(self._path, name)
        setattr(self, name, kernel)
        return kernel


class _Kernel:
    """A function of one pointer; whoever calls it has what that points to as local variables."""

    def __init__(self, library: Path, name: str) -> None:
        self._library, self._name = library, name

    def __call__(self, reference: Any) -> None:
        _emulator().call(self._library, self._name, reference._obj, sys._getframe(1))


class _Block(NamedTuple):
    """Memory of this process."""

    address: int
    num_bytes: int
    has_addresses: bool  # rather than numbers


class _Emulator:
    """One process for all kernels, which ends with this one."""

    def __init__(self) -> None:
        self._memory = os.memfd_create("kernels")
        os.truncate(self._memory, _SIZE)
        emulator = _find_emulator()
        assert emulator is not None
        with tempfile.TemporaryDirectory() as folder:
            program, source = f"{folder}/emulated", str(Path(__file__).with_suffix(".cpp"))
            subprocess.run([COMPILER, source, "-o", program, "-ldl"], check=True)
            self._process = subprocess.Popen(
                [emulator, "-L", SYSTEM, program, str(self._memory), str(_SIZE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[self._memory],
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},  # spinning is emulated as well
            )
            atexit.register(self._process.communicate)
            self._begin = int(self._answer())

    def call(
        self, library: Path, name: str, arguments: ctypes.Structure, caller: FrameType
    ) -> None:
        """Call a kernel there as if it were here.

        Args:
            library: that has the kernel.
            name: of the kernel.
            arguments: what it takes; integers from ``_LEAST_ADDRESS`` on are addresses.
            caller: in whose variables, or its callers', are the tensors that have these.
        """
        os.truncate(self._memory, 0)  # whatever is not written reads as zeros
        os.truncate(self._memory, _SIZE)
        image = _Image(self._memory, self._begin, caller)
        offset = image.place_arguments(arguments)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{library} {name} {offset}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer != "done":
            raise RuntimeError(f"{name} of {library} cannot be called: {answer}")
        image.copy_back()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if answer := self._process.stdout.readline().strip():
            return answer
        raise RuntimeError(f"the emulator ended with status {self._process.wait()}")


class _Image:
    """Memory that one call points to, in the emulator.

    Args:
        memory: descriptor of it.
        begin: where the emulator has it.
        caller: see ``_Emulator.call``.
    """

    def __init__(self, memory: int, begin: int, caller: FrameType) -> None:
        self._memory, self._begin, self._used = memory, begin, 0
        self._caller: FrameType | None = caller
        self._blocks: list[_Block] = []  # of the callers so far
        self._offsets: dict[_Block, int] = {}

    def place_arguments(self, arguments: ctypes.Structure) -> int:
        """Copy arguments and all that they point to; the offset of the arguments."""
        moved = type(arguments).from_buffer_copy(arguments)
        for name, kind in moved._fields_:
            if kind is ctypes.c_int64:
                setattr(moved, name, self._move(getattr(moved, name)))
        return self._append(moved, ctypes.sizeof(moved))

    def copy_back(self) -> None:
        """Give the tensors what the kernel has written, and what it was to leave alone."""
        for block, offset in self._offsets.items():
            if not block.has_addresses:
                for start, stop in _written(self._memory, offset, block.num_bytes):
                    content = _at(block.address + start - offset, stop - start)
                    num_bytes = os.preadv(self._memory, [content], start)
                    assert num_bytes == stop - start

    def _move(self, value: int) -> int:
        """An argument as the emulator takes it."""
        if value < _LEAST_ADDRESS:
            return value
        block = self._find(value)
        if block not in self._offsets:
            self._offsets[block] = self._place(block)
        return self._begin + self._offsets[block] + value - block.address

    def _find(self, address: int) -> _Block:
        """The memory that has an address; of callers of callers only if it must be theirs."""
        while True:
            for block in self._blocks:
                if block.address <= address < block.address + block.num_bytes:
                    return block
            assert self._caller is not None, f"no tensor of the callers is at {address:#x}"
            self._blocks += _blocks_of(self._caller)
            self._caller = self._caller.f_back

    def _place(self, block: _Block) -> int:
        if block.has_addresses:
            values = (ctypes.c_int64 * (block.num_bytes // 8)).from_address(block.address)
            moved = (ctypes.c_int64 * len(values))(*map(self._move, values))
            return self._append(moved, block.num_bytes)
        offset = self._reserve(block.num_bytes, block.address % _PAGE)
        for start, stop in _touched(block):
            _write(self._memory, _at(start, stop - start), offset + start - block.address)
        return offset

    def _append(self, content: Any, num_bytes: int) -> int:
        offset = self._reserve(num_bytes, 0)
        _write(self._memory, content, offset)
        return offset

    def _reserve(self, num_bytes: int, in_page: int) -> int:
        """An offset as far from the begin of a page as here."""
        offset = self._used + in_page
        self._used = -(-(offset + num_bytes) // _PAGE) * _PAGE
        assert self._used <= _SIZE
        return offset


def _blocks_of(frame: FrameType) -> Iterator[_Block]:
    """Memory of the tensors and tables among the local variables of a function at work."""
    for leaf in tree_leaves(list(frame.f_locals.values())):
        if isinstance(leaf, Tensor):
            storage = leaf.untyped_storage()
            yield _Block(storage.data_ptr(), storage.nbytes(), has_addresses=False)
        elif isinstance(leaf, ctypes.Array):
            yield _Block(ctypes.addressof(leaf), ctypes.sizeof(leaf), has_addresses=True)


def _touched(block: _Block) -> Iterator[tuple[int, int]]:
    """From where to where memory of this process was ever written; all else is zeros."""
    stop = block.address + block.num_bytes
    first, last = block.address // _PAGE, -(-stop // _PAGE)
    entries = np.fromfile("/proc/self/pagemap", np.uint64, last - first, offset=8 * first)
    is_there = (entries >> np.uint64(62)) != 0  # in memory, or swapped
    edges = np.flatnonzero(np.diff(is_there, prepend=False, append=False)) + first
    for low, high in edges.reshape(-1, 2) * _PAGE:
        yield max(int(low), block.address), min(int(high), stop)


def _written(memory: int, offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """From where to where a part of the shared memory was ever written."""
    stop = offset + num_bytes
    while offset < stop:
        try:
            start = os.lseek(memory, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing from here on
        if start >= stop:
            return
        offset = min(stop, os.lseek(memory, start, os.SEEK_HOLE))
        yield start, offset


def _at(address: int, num_bytes: int) -> Any:
    return (ctypes.c_char * num_bytes).from_address(address)


def _write(memory: int, content: Any, offset: int) -> None:
    num_bytes = os.pwrite(memory, content, offset)
    assert num_bytes == ctypes.sizeof(content)


@cache
def _emulator() -> _Emulator:
    return _Emulator()


@cache
def _find_emulator() -> str | None:
    return next(filter(None, map(shutil.which, EMULATORS)), None)
