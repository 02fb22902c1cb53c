"""Weights from safetensors straight to their place, a slice at a time; all names checked first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mnemosyne.files import shown
from mnemosyne.parallel.shards import Slices, allocate, held_slices
from mnemosyne.runtime.headers import (
    HEAD,
    Header,
    check_tensors,
    head_differs,
    open_weights,
    read_headers,
)

BLOCK_BYTES = 64 << 20  # read at once: all that exists beside the parameters

Progress = Callable[[int, int], None]


class Model(Protocol):
    """What loading needs of a decoder; it arrives as an argument."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters held here, by our name."""

    def get_submodule(self, target: str) -> nn.Module:
        """The module that owns a parameter."""

    def checkpoint_names(self) -> dict[str, str]:
        """Tensor name in the checkpoint of each parameter held here, by our name."""

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
    file and its converted copy. Names and shapes of the whole checkpoint are checked before the
    first weight is read, also those that other ranks hold. Of a DTensor only the slice of this
    rank is read, and a plain tensor takes its place.

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
    headers, shapes = read_headers(path), model.checkpoint_shapes()
    check_tensors(path, headers, shapes)
    if HEAD not in shapes and head_differs(headers):
        raise ValueError(
            f"{HEAD} of {shown(str(path), 400)} must be the embedding in a tied model, got "
            "another; set tie_word_embeddings to false"
        )
    names = model.checkpoint_names()
    held = {ours: held_slices(parameter) for ours, parameter in model.named_parameters()}
    total = sum(headers[name].num_bytes(held[ours]) for ours, name in names.items())
    done = 0
    for file in sorted({headers[name].file for name in names.values()}):
        with open_weights(file) as tensors:
            for ours in (ours for ours, name in names.items() if headers[name].file == file):
                module, _, attribute = ours.rpartition(".")
                target = allocate(model.get_submodule(module), attribute, device)
                view = tensors.get_slice(names[ours])
                for num_bytes in _copy(view, headers[names[ours]], held[ours], target):
                    done += num_bytes
                    if progress is not None:
                        progress(done, total)
    return done


def _copy(view: Any, header: Header, held: Slices, target: Tensor) -> Iterator[int]:
    """Copy held rows in blocks, converting dtype and device on the way; yields bytes per block."""
    rows, *rest = held
    row_bytes = header.num_bytes((slice(0, 1), *rest))
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, block_rows):
        stop = min(start + block_rows, rows.stop)
        target[start - rows.start : stop - rows.start].copy_(view[(slice(start, stop), *rest)])
        yield (stop - start) * row_bytes
