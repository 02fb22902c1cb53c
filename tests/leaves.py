"""Small leaves for tests: files of 32 tokens, written of any prefix and always read again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne.cache.chain import ID_DTYPE, Chain, seed_of
from mnemosyne.cache.leaf_file import Layout, Leaf, Part, Span
from mnemosyne.cache.leaf_folder import LeafCounts
from mnemosyne.cache.leaf_storage import Storage
from mnemosyne.joining import leaves as joining
from mnemosyne.llm import LLM
from mnemosyne.schedule import restores, saves

LEAF = 32  # tokens
LAYOUT = Layout("ab" * 32, "tiny", "float32", head_dim=4, num_layers=3, num_heads=2, leaf_tokens=8)
WHOLE = Part(Span(0, 3), Span(0, 2), Span(0, 8))


def use_small_leaves(setattr_: Callable[[Any, str, object], None] = setattr) -> None:
    """Patch the sizes, by ``monkeypatch.setattr`` or, in a process of its own, for good."""
    setattr_(joining, "LEAF_TOKENS", LEAF)
    setattr_(saves, "MIN_LEAVES", 1)
    setattr_(restores, "READ_BYTES_PER_S", 1e30)
    setattr_(restores, "LEAF_S", 0.0)
    setattr_(restores, "LEARNED", 0.0)


def counts_of(llm: LLM) -> LeafCounts:
    """Counts of what rank 0 has done with its folder."""
    leaves = llm._session._leaves
    assert leaves is not None
    return leaves.folder.counts


def chain_of_leaves(count: int, seed: int = 0) -> list[Leaf]:
    """Neighbouring leaves of ``LAYOUT`` with random tokens."""
    size = LAYOUT.leaf_tokens
    ids = np.random.default_rng(seed).integers(0, 1000, count * size)
    chain = Chain(seed_of(b"tiny", None), ids, size)
    return [
        Leaf(
            chain.digests[index],
            chain.before(index),
            index * size,
            ids[index * size : (index + 1) * size].astype(ID_DTYPE).tobytes(),
        )
        for index in range(count)
    ]


def pieces_of(part: Part, seed: int = 0) -> list[memoryview]:
    """Random keys and values of a part, as ``encode`` takes them."""
    rng = np.random.default_rng(seed)
    shape = (2 * part.layers.size, part.heads.size * part.tokens.size * LAYOUT.head_dim)
    numbers = rng.standard_normal(shape).astype(np.float32)
    return [row.view(np.uint8).data for row in numbers]


class PowerCut(BaseException):
    """The machine is off: whoever runs then runs no more."""


class FaultyStorage(Storage):
    """A folder whose disk fails at one of its operations: it is full, or power is cut.

    A cut loses the end of what was not synced, as a file system may.

    Args:
        folder: that is there.
        fails_at: index of the operation; None: none fails.
        error: that it raises; None: power is cut there and nothing runs after it.
    """

    def __init__(self, folder: Path, fails_at: int | None, error: int | None = None) -> None:
        super().__init__(folder)
        self.num_operations = 0
        self._fails_at = fails_at
        self._error = error

    def append(self, descriptor: int, data: memoryview) -> None:
        if self._is_due():
            os.write(descriptor, data[: len(data) // 2])
            self._fail(descriptor)
        super().append(descriptor, data)

    def sync(self, descriptor: int) -> None:
        if self._is_due():
            self._fail(descriptor)
        super().sync(descriptor)

    def rename(self, name: str, other: str) -> None:
        if self._is_due():
            self._fail()
        super().rename(name, other)

    def remove(self, name: str) -> None:
        if self._is_off:
            raise PowerCut
        super().remove(name)

    @property
    def _is_off(self) -> bool:
        return (
            self._error is None
            and self._fails_at is not None
            and self.num_operations > self._fails_at
        )

    def _is_due(self) -> bool:
        if self._is_off:
            raise PowerCut
        self.num_operations += 1
        return self.num_operations - 1 == self._fails_at

    def _fail(self, descriptor: int | None = None) -> None:
        if self._error is not None:
            raise OSError(self._error, os.strerror(self._error))
        if descriptor is not None:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 3)
        raise PowerCut
