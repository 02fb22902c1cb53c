"""How a parameter lies in the files of a checkpoint: as it is, or to be arranged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mnemosyne.parallel.shards import Slices

Shape = tuple[int, ...]
Tensors = Callable[[str], Any]  # from a name, something that gives slices of the stored tensor


class Source(Protocol):
    """Where a parameter comes from."""

    @property
    def name(self) -> str:
        """What a checkpoint calls it; of one that is stored in parts, what the parts share."""

    @property
    def shape(self) -> Shape:
        """Of the whole parameter."""

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes of what is stored."""

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


def count(held: Slices) -> int:
    """Elements of a part of a parameter."""
    return math.prod(part.stop - part.start for part in held)
