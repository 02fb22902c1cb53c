"""Weights from safetensors straight to their place, a slice at a time; all names checked first."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from mnemosyne.files import shown
from mnemosyne.parallel.shards import Slices, allocate, held_slices
from mnemosyne.runtime.headers import (
    DTYPES,
    HEAD,
    Header,
    check_tensors,
    head_differs,
    open_weights,
    read_headers,
)

BLOCK_BYTES = 64 << 20  # read at once: all that exists beside the parameters

Progress = Callable[[int, int], None]


class Source(Protocol):
    """The source of a parameter in a checkpoint."""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the stored tensors."""

    def read(self, tensors: Callable[[str], Any], held: Slices) -> Tensor:
        """The values of a part of the parameter, in the dtype of the file."""


class Model(Protocol):
    """The methods of a decoder that loading needs; it arrives as an argument."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters held here, by our name."""

    def get_submodule(self, target: str) -> nn.Module:
        """The module that owns a parameter."""

    def sources(self) -> Mapping[str, Source]:
        """The source of each parameter held here in a checkpoint, by our name."""

    def known_name(self, stored: str) -> str | None:
        """The name here of a stored tensor; None for one that is not used."""

    def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the whole model, by its name in the checkpoint."""


def load_weights(
    model: Model,
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> int:
    """Fill a model's parameters from a Hugging Face checkpoint.

    Besides the parameters at most two blocks of 64 MiB exist at a time: one in the dtype of the
    file and its converted copy; of 4-bit numbers, which are unpacked in float32, some ten. Names
    and shapes of the whole checkpoint are checked before the first weight is read, also those that
    other ranks hold. Of a DTensor only the slice of this rank is read, and a plain tensor takes
    its place.

    Args:
        model: parameters keep their dtype; those on the meta device are allocated on ``device``.
        path: directory with ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        device: where parameters of the meta device go; the others stay where they are.
        progress: called with bytes read so far and bytes to read, of the file, after each block.

    Returns:
        Bytes read of the files, headers aside.

    Raises:
        ValueError: if a file is missing, truncated or not safetensors (it is named), or if
            tensors are missing, surplus, misshapen or of an integer dtype (they are listed), or if
            the model is tied and the files hold a head of their own.
    """
    path = Path(path)
    headers, shapes = read_headers(path, model.known_name), model.checkpoint_shapes()
    check_tensors(path, headers, shapes)
    if HEAD not in shapes and head_differs(headers):
        raise ValueError(
            f"{HEAD} of {shown(str(path), 400)} must be the embedding in a tied model, got "
            "another; set tie_word_embeddings to false"
        )
    sources = model.sources()
    held = {ours: held_slices(parameter) for ours, parameter in model.named_parameters()}
    total = sum(_num_bytes(source, headers, held[ours]) for ours, source in sources.items())
    done = 0
    with _Files(headers) as files:
        for ours in sorted(sources, key=lambda ours: _place(sources[ours], headers)):
            module, _, attribute = ours.rpartition(".")
            target = allocate(model.get_submodule(module), attribute, device)
            for num_bytes in _copy(sources[ours], files, held[ours], target):
                done += num_bytes
                if progress is not None and num_bytes:
                    progress(done, total)
    return done


class _Files:
    """Files of weights, the one last read from open."""

    def __init__(self, headers: dict[str, Header]) -> None:
        self.headers = headers
        self._file: Path | None = None
        self._stack = ExitStack()
        self._tensors: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Any:
        """A source of slices of a tensor."""
        file = self.headers[name].file
        if file != self._file:
            self._stack.close()  # the mapped part of a file counts as memory of this process
            self._file, self._tensors = file, self._stack.enter_context(open_weights(file))
        return self._tensors.get_slice(self.headers[name].name)


def _copy(source: Source, files: _Files, held: Slices, target: Tensor) -> Iterator[int]:
    """Copy held rows in blocks, converting dtype and device on the way; yields bytes per block."""
    first, one_row = held[0].start, (slice(0, 1), *held[1:])
    for block in _blocks(held, _num_bytes(source, files.headers, one_row)):
        values = source.read(files.tensor, block)
        target[block[0].start - first : block[0].stop - first].copy_(values)
        yield _num_bytes(source, files.headers, block)


def _place(source: Source, headers: dict[str, Header]) -> Path:
    """The first file that a parameter is read from."""
    return min((headers[name].file for name in source.tensors()), default=Path())


def _num_bytes(source: Source, headers: dict[str, Header], held: Slices) -> int:
    """Bytes in the files of a part of a parameter."""
    itemsizes = {DTYPES.get(headers[name].dtype, 1) for name in source.tensors()}
    return math.prod(part.stop - part.start for part in held) * max(itemsizes, default=0)


def _blocks(held: Slices, row_bytes: int) -> Iterator[Slices]:
    """Runs of rows of a part of a parameter, small enough to be read at once."""
    rows, *rest = held
    num_rows = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(rows.start, rows.stop, num_rows):
        yield (slice(start, min(start + num_rows, rows.stop)), *rest)
