"""The tensor work of a function on a CPU, recorded once and repeated without its Python.

The counterpart of a CUDA graph. Kernels in C++ report themselves, a call of C++ repeats all that
follow one another; operators of torch are called again by Python.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnemosyne.kernels.cpu.library import load_library
from mnemosyne.kernels.cpu.memory import huge_zeros

ALIGNMENT = 64  # bytes

_RECORDING: ContextVar[Tape | None] = ContextVar("recording", default=None)


class _Call(ctypes.Structure):
    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


def launch(kernel: Any, arguments: ctypes.Structure, *kept: Any) -> None:
    """Call a kernel, and have it repeated by the tape that records, if there is one.

    Args:
        kernel: a C function of one pointer.
        arguments: what that points to.
        kept: what the arguments point to, as far as it is no tensor.
    """
    kernel(ctypes.byref(arguments))
    tape = _RECORDING.get()
    if tape is not None:
        tape.add(kernel, arguments, kept)


class Memory:
    """Memory of a fixed size for what tapes compute on the way, given again once it is free.

    Tapes that never run at the same time may share it.

    Args:
        num_bytes: that there are.
    """

    def __init__(self, num_bytes: int) -> None:
        self._bytes = huge_zeros((num_bytes,), torch.uint8)
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # offsets by size
        self._used = -self._bytes.data_ptr() % ALIGNMENT

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor that is here as long as it lives; None if there is no room left."""
        count = math.prod(shape)
        size = -(-max(1, count * dtype.itemsize) // ALIGNMENT) * ALIGNMENT
        if self._free[size]:
            offset = self._free[size].pop()
        elif self._used + size <= len(self._bytes):
            offset = self._used
            self._used += size
        else:
            return None
        # The tensor's storage holds this array, which nobody else does: they end together.
        owner = (ctypes.c_char * size).from_address(self._bytes.data_ptr() + offset)
        finalize(owner, self._free[size].append, offset)
        return torch.frombuffer(owner, dtype=dtype, count=count).view(tuple(shape))


class Tape(TorchDispatchMode):
    """A ``runtime.graphs.Graph`` that records on the CPU.

    All that is computed from tensors that were there before is computed again at each replay,
    from what these hold then, to the same addresses; what is computed from numbers alone is not.
    Kernels may write to memory from ``new_empty`` or from before; whatever was there before must
    outlive the tape.

    Args:
        memory: where to put what is computed on the way.
    """

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self._memory = memory
        self._steps: list[Callable[[], object]] = []
        self._calls: list[tuple[Any, ctypes.Structure]] = []  # since the last operator of torch
        self._kept: list[Any] = []  # that steps point to
        self._constants: set[int] = set()  # storages that hold the same at each replay

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record what ``run`` does; the tensor that each replay overwrites.

        Raises:
            RuntimeError: if what it does depends on the value of a tensor.
        """
        with self, _recording(self):
            result = run()
        self._end_calls()
        return result

    def replay(self) -> None:
        """Do it again."""
        for step in self._steps:
            step()

    def __len__(self) -> int:
        """Calls that a replay makes from Python."""
        return len(self._steps)

    def add(self, kernel: Any, arguments: ctypes.Structure, kept: Sequence[Any]) -> None:
        """Repeat a kernel (see ``launch``)."""
        self._calls.append((kernel, arguments))
        self._kept += kept

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Run an operator, and record it if what it gives may be another thing next time."""
        keywords = keywords or {}
        if function is torch.ops.aten.new_empty.default:
            found = self._new_empty(*arguments, **keywords)
            if found is not None:
                return found
        result = function(*arguments, **keywords)
        given, results = _tensors((arguments, keywords)), _tensors(result)
        is_fixed = all(_storage(x) in self._constants for x in given)
        has_number = not results or torch.Tag.dynamic_output_shape in function.tags
        if has_number and not is_fixed:
            raise RuntimeError("what depends on the value of a tensor cannot be replayed")
        if function._schema.is_mutable:
            if any(_storage(x) in self._constants for x in results):
                raise RuntimeError("what writes to a constant of its own cannot be replayed")
            self._record(partial(function, *arguments, **keywords))
        elif {_storage(x) for x in results} <= {_storage(x) for x in given}:
            return result  # views
        elif is_fixed and "empty" not in function.overloadpacket.__name__:
            self._constants.update(map(_storage, results))
        elif "empty" not in function.overloadpacket.__name__:
            self._record(partial(_again, function, arguments, keywords, results))
        self._kept += results
        return result

    def _new_empty(self, like: Tensor, shape: Sequence[int], **keywords: Any) -> Tensor | None:
        if set(keywords) - {"dtype", "pin_memory"} or like.device.type != "cpu":
            return None
        return self._memory.empty(shape, keywords.get("dtype") or like.dtype)

    def _record(self, step: Callable[[], object]) -> None:
        self._end_calls()
        self._steps.append(step)

    def _end_calls(self) -> None:
        """Make one step of the kernels since the last operator."""
        if not self._calls:
            return
        table = (_Call * len(self._calls))()
        for call, (kernel, arguments) in zip(table, self._calls, strict=True):
            call.kernel = ctypes.cast(kernel, ctypes.c_void_p).value
            call.arguments = ctypes.addressof(arguments)
        self._kept += table, self._calls
        self._steps.append(partial(compile_tape().run, table, len(self._calls)))
        self._calls = []


@cache
def compile_tape() -> Any:
    """The C function that repeats calls; compiled if it never was on this machine."""
    library = load_library("tape")
    library.run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.run.restype = None
    return library


@contextmanager
def _recording(tape: Tape) -> Iterator[None]:
    token = _RECORDING.set(tape)
    try:
        yield
    finally:
        _RECORDING.reset(token)


def _again(function: Any, arguments: Any, keywords: Any, results: list[Tensor]) -> None:
    """Call an operator once more and put what it gives where the first results are."""
    for old, new in zip(results, _tensors(function(*arguments, **keywords)), strict=True):
        old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
