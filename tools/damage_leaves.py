"""Damage folders of ``cache.dir`` in every way that is known, and serve from what is left.

A folder is filled by one start, or while its disk fails: it is full, or power is cut at one of its
operations. Then its files are damaged: bits flipped, ends cut off, names or pieces swapped, a file
of another model or dtype put in place of ours. A second start serves the same prompt from it, and
a third one does so again. Checked: tokens and log-probabilities are those of a run without a
folder, all leaves before the damage are used, damage is told in the log, and the third start finds
everything whole. All follows from the seed.

Usage: python tools/damage_leaves.py [--folders 200] [--seed 0] [--model needle]
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from mnemosyne.cache.leaf_file import PREFIX_BYTES
from mnemosyne.cache.leaf_storage import Storage
from mnemosyne.joining import leaves as joining
from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput, SamplingParams
from mnemosyne.schedule import restores, saves

LEAF = 32  # tokens
NUM_LEAVES = 5
DTYPE = "float64"
TOLERANCE = 1e-10  # of log-probabilities


class PowerCut(OSError):
    """The machine is off: nothing that follows reaches the disk."""


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
        self._check_power()
        super().remove(name)

    def note_used(self, name: str, used_ns: int) -> None:
        self._check_power()
        super().note_used(name, used_ns)

    def _check_power(self) -> None:
        is_past = self._fails_at is not None and self.num_operations > self._fails_at
        if self._error is None and is_past:
            raise PowerCut(errno.EIO, "power is cut")

    def _is_due(self) -> bool:
        self._check_power()
        self.num_operations += 1
        return self.num_operations - 1 == self._fails_at

    def _fail(self, descriptor: int | None = None) -> None:
        if self._error is not None:
            raise OSError(self._error, os.strerror(self._error))
        if descriptor is not None:
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 3)
        raise PowerCut(errno.EIO, "power is cut")


def use_small_leaves(setattr_: Callable[[Any, str, object], None] = setattr) -> None:
    """Have leaves of 32 tokens, written of any prefix and always read again.

    Args:
        setattr_: ``monkeypatch.setattr`` of a test, which undoes it.
    """
    setattr_(joining, "LEAF_TOKENS", LEAF)
    setattr_(saves, "MIN_LEAVES", 1)
    setattr_(restores, "READ_BYTES_PER_S", 1e30)
    setattr_(restores, "LEAF_S", 0.0)
    setattr_(restores, "LEARNED", 0.0)


@dataclass(slots=True)
class Start:
    """The outcome of one start over a folder."""

    output: RequestOutput
    num_restored: int  # tokens
    told: list[str]


class Folders:
    """Folders of one model that are filled, damaged and served from.

    Args:
        model: a checkpoint.
        scratch: an empty directory.
    """

    def __init__(self, model: str, scratch: Path) -> None:
        self._model = model
        self._scratch = scratch
        self._filled = scratch / "filled"
        self._foreign = {kind: scratch / f"other-{kind}" for kind in ("dtype", "model")}
        self._prompt = np.random.default_rng(0).integers(3, 90, NUM_LEAVES * LEAF + 9)
        self._expected = self.start(None).output
        self.start(self._filled)
        self.start(self._foreign["dtype"], dtype="float32")
        with mock.patch.object(joining, "model_fingerprint", return_value=b"\x07" * 32):
            self.start(self._foreign["model"])
        self.names = self._in_order(self._filled)

    def start(
        self, folder: Path | None, *, dtype: str = DTYPE, storage: type[Storage] | Any = Storage
    ) -> Start:
        """Serve the prompt once.

        Args:
            folder: of ``cache.dir``; None: there is none.
            dtype: that the model is computed in.
            storage: makes what reads and writes the folder.
        """
        listener = _Listener()
        logger = logging.getLogger("mnemosyne.cache")
        logger.addHandler(listener)
        patched = mock.patch.object(joining, "Storage", storage) if folder else nullcontext()
        where = {} if folder is None else {"dir": str(folder)}
        try:
            with (
                patched,
                LLM(
                    self._model,
                    dtype=dtype,
                    device="cpu",
                    schedule={"chunk": 128},
                    cache={"max_tokens": 512, "page_size": 16, **where},
                ) as llm,
            ):
                params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=9, ignore_eos=True)
                (output,) = llm.generate(self._prompt, params)
        finally:
            logger.removeHandler(listener)
        return Start(output, output.metrics.num_restored, listener.told)

    def damage(self, folder: Path, kind: str, rng: np.random.Generator) -> int:
        """Copy the filled folder and damage it.

        Returns:
            Index of the first leaf that is damaged.
        """
        shutil.copytree(self._filled, folder)
        index, other = sorted(rng.choice(NUM_LEAVES, 2, replace=False).tolist())
        file, second = folder / self.names[index], folder / self.names[other]
        data = bytearray(file.read_bytes())
        match kind:
            case "bits":
                data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            case "cut":
                del data[rng.integers(len(data)) :]
            case "pieces":
                size = (len(data) - PREFIX_BYTES - int.from_bytes(data[:8], "little")) // 9
                first, last = data[-size:], data[-2 * size : -size]
                data[-2 * size :] = first + last
            case "names":
                data[:], swapped = second.read_bytes(), bytes(data)
                second.write_bytes(swapped)
            case "model" | "dtype":
                foreign = self._foreign[kind]
                data[:] = (foreign / self._in_order(foreign)[index]).read_bytes()
        file.write_bytes(data)
        return index

    def check(self, kind: str, rng: np.random.Generator, name: str) -> int:
        """Damage one folder and serve from it twice.

        Returns:
            Tokens that were restored before the damage.

        Raises:
            AssertionError: if anything but the time differs from a run without a folder.
        """
        folder, told = self._scratch / name, list[str]()
        if kind in ("full", "power"):
            fails_at = int(rng.integers(60))
            error = errno.ENOSPC if kind == "full" else None
            filling = self.start(folder, storage=lambda path: FaultyStorage(path, fails_at, error))
            self._compare(filling)
            told, whole = filling.told, [(folder / each).exists() for each in self.names]
            index = whole.index(False) if False in whole else NUM_LEAVES
            for file in folder.iterdir():  # long ago
                os.utime(file, (0, 0))
        else:
            index = self.damage(folder, kind, rng)
        damaged, healed = self.start(folder), self.start(folder)
        for start in (damaged, healed):
            self._compare(start)
        assert damaged.num_restored == index * LEAF, "leaves before the damage are used"
        assert told or damaged.told or index == NUM_LEAVES, "damage is told"
        assert healed.num_restored == NUM_LEAVES * LEAF, "the next start finds all whole"
        assert not healed.told, healed.told
        shutil.rmtree(folder)
        return damaged.num_restored

    def _compare(self, start: Start) -> None:
        ours, expected = start.output, self._expected
        assert ours.error is None
        assert ours.token_ids == expected.token_ids, "a wrong token"
        assert ours.logprobs is not None
        assert expected.logprobs is not None
        for one, other in zip(ours.logprobs, expected.logprobs, strict=True):
            assert abs(one.logprob - other.logprob) < TOLERANCE

    def _in_order(self, folder: Path) -> list[str]:
        """Names of the files of leaves, by the position of their first token."""
        files = sorted(folder.glob("*.safetensors"), key=_start_of)
        assert len(files) == NUM_LEAVES, f"{len(files)} leaves in {folder}"
        return [file.name for file in files]


KINDS = ("bits", "cut", "names", "pieces", "model", "dtype", "full", "power")


class _Listener(logging.Handler):
    """Keeps the warnings that are logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def _start_of(file: Path) -> int:
    header = file.read_bytes()
    return int(header.partition(b'\\"start\\":')[2].partition(b",")[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", type=int, default=200, help="that are damaged")
    parser.add_argument("--seed", type=int, default=0, help="of all damage")
    parser.add_argument("--model", default="needle", help="a small checkpoint")
    arguments = parser.parse_args()
    use_small_leaves()
    logging.getLogger("mnemosyne").addHandler(logging.NullHandler())
    rng, started_s = np.random.default_rng(arguments.seed), time.perf_counter()
    counts, restored = Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="mnemosyne-leaves-") as scratch:
        folders = Folders(arguments.model, Path(scratch))
        for index in range(arguments.folders):
            kind = KINDS[index % len(KINDS)]
            try:
                restored += folders.check(kind, rng, str(index))
            except AssertionError:
                print(f"folder {index}, {kind}:", file=sys.stderr)
                raise
            counts[kind] += 1
    parts = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    seconds = time.perf_counter() - started_s
    print(f"{sum(counts.values())} folders in {seconds:.0f} s: {parts}")
    print(f"no wrong token; {restored:,} tokens before the damage were restored; all healed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
