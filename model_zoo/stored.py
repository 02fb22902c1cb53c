"""The layout of a parameter in the files of a checkpoint: as it is, or to be arranged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mnemosyne.parallel.shards import Slices

Shape = tuple[int, ...]
GROUP = 32  # numbers of 4 bits that share a scale, two in a byte, the lower bits first
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
Tensors = Callable[[str], Any]  # from a name, something that gives slices of the stored tensor


class Source(Protocol):
    """The source of a parameter in a checkpoint."""

    @property
    def name(self) -> str:
        """The name in a checkpoint; for one that is stored in parts, the prefix that they share."""

    @property
    def shape(self) -> Shape:
        """The shape of the whole parameter."""

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of the stored tensors."""

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """The values of a part of the parameter, in the dtype of the file.

        Args:
            tensors: opens a stored tensor.
            held: the part, a slice with both ends per dim.
        """


class Whole(NamedTuple):
    """Stored as it is."""

    name: str
    shape: Shape

    def tensors(self) -> dict[str, Shape]:
        """See ``Source``."""
        return {self.name: self.shape}

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """See ``Source``."""
        values: Tensor = tensors(self.name)[held]
        return values


class Reordered(NamedTuple):
    """Stored with the rows of each head in another order."""

    name: str
    shape: Shape
    order: tuple[int, ...]  # of each row of a head, the stored row of that head

    def tensors(self) -> dict[str, Shape]:
        """See ``Source``."""
        return {self.name: self.shape}

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """See ``Source``."""
        rows, size = torch.arange(held[0].start, held[0].stop), len(self.order)
        stored = rows - rows % size + torch.tensor(self.order)[rows % size]
        first, last = int(stored.min()), int(stored.max())
        values: Tensor = tensors(self.name)[(slice(first, last + 1), *held[1:])]
        return values[stored - first]


class Ones(NamedTuple):
    """Stored nowhere, because every value is 1."""

    name: str
    shape: Shape

    def tensors(self) -> dict[str, Shape]:
        """See ``Source``."""
        return {}

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """See ``Source``."""
        return torch.ones([part.stop - part.start for part in held])


class Stack(NamedTuple):
    """Stored as one tensor for each index of the first dim."""

    name: str
    parts: tuple[Source, ...]

    @property
    def shape(self) -> Shape:
        """See ``Source``."""
        return len(self.parts), *self.parts[0].shape

    def tensors(self) -> dict[str, Shape]:
        """See ``Source``."""
        return {name: shape for part in self.parts for name, shape in part.tensors().items()}

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """See ``Source``."""
        return torch.stack([part.read(tensors, held[1:]) for part in self.parts[held[0]]])


class Strided(NamedTuple):
    """Every few of the last dim of a stored stack, which may hold rows where others hold columns.

    Gate and up projections lie so in one tensor: as halves, or element by element in turns.
    """

    name: str
    shape: Shape
    stored: Shape
    start: int = 0  # of the last stored dim
    step: int = 1
    is_transposed: bool = False

    def tensors(self) -> dict[str, Shape]:
        """See ``Source``."""
        return {self.name: self.stored}

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """See ``Source``."""
        *others, last = (held[0], held[2], held[1]) if self.is_transposed else held
        first = self.start + self.step * last.start
        stop = self.start + self.step * (last.stop - 1) + 1
        values: Tensor = tensors(self.name)[(*others, slice(first, stop))][..., :: self.step]
        return values.transpose(1, 2) if self.is_transposed else values


class Mxfp4(NamedTuple):
    """Every few rows of a stored stack of 4-bit numbers, 32 of which share a power of two.

    The values are exact in bfloat16. Source: OCP Microscaling Formats 1.0.
    """

    name: str
    shape: Shape  # [X, rows, columns]
    num_rows: int  # stored
    start: int = 0  # of the stored rows
    step: int = 1

    def tensors(self) -> dict[str, Shape]:
        """See ``Source``."""
        num_experts, _, columns = self.shape
        scales = num_experts, self.num_rows, columns // GROUP
        return {f"{self.name}_blocks": (*scales, GROUP // 2), f"{self.name}_scales": scales}

    def read(self, tensors: Tensors, held: Slices) -> Tensor:
        """See ``Source``."""
        experts, rows, columns = held
        first = self.start + self.step * rows.start
        stored_rows = slice(first, self.start + self.step * (rows.stop - 1) + 1)
        groups = slice(columns.start // GROUP, -(-columns.stop // GROUP))
        part = experts, stored_rows, groups
        blocks = tensors(f"{self.name}_blocks")[part][:, :: self.step].int()
        scales = tensors(f"{self.name}_scales")[part][:, :: self.step].int() - 127
        pairs = torch.tensor([(FP4[byte & 15], FP4[byte >> 4]) for byte in range(256)])
        numbers = pairs[blocks]
        values = torch.ldexp(numbers.flatten(-2), scales.unsqueeze(-1)).flatten(-2)
        before = columns.start - GROUP * groups.start
        return values[..., before : before + columns.stop - columns.start]
