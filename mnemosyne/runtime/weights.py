"""Weights from safetensors straight to their place, a slice at a time; all names checked first."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mnemosyne.parallel.shards import Slices, allocate, held_slices

BLOCK_BYTES = 64 << 20  # read at once: all that exists beside the parameters
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of files, with bytes per element
NAMES_SHOWN = 20  # per kind of mismatch; the rest is counted

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
            tensors are missing, surplus, misshapen or of an integer dtype (they are listed).
    """
    path = Path(path)
    headers = _read_headers(path)
    _check_tensors(path, headers, model.checkpoint_shapes())
    names = model.checkpoint_names()
    held = {ours: held_slices(parameter) for ours, parameter in model.named_parameters()}
    total = sum(headers[name].num_bytes(held[ours]) for ours, name in names.items())
    done = 0
    for file in sorted({headers[name].file for name in names.values()}):
        with _open(file) as tensors:
            for ours in (ours for ours, name in names.items() if headers[name].file == file):
                module, _, attribute = ours.rpartition(".")
                target = allocate(model.get_submodule(module), attribute, device)
                view = tensors.get_slice(names[ours])
                for num_bytes in _copy(view, headers[names[ours]], held[ours], target):
                    done += num_bytes
                    if progress is not None:
                        progress(done, total)
    return done


class _Header(NamedTuple):
    """What a file says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    def num_bytes(self, held: Slices) -> int:
        return math.prod(part.stop - part.start for part in held) * DTYPES[self.dtype]


def _open(file: Path) -> Any:
    """The file as a context manager; its header is checked, its size too, nothing else is read."""
    if not file.is_file():
        raise ValueError(f"weights file must exist, got {str(file)!r}; download it again")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"weights file must be whole and safetensors, got {str(file)!r} ({error}); "
            "download it again"
        ) from error


def _read_headers(path: Path) -> dict[str, _Header]:
    """Headers of all files of a checkpoint, by tensor name."""
    headers: dict[str, _Header] = {}
    for file in _files(path):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dict
                view = tensors.get_slice(name)
                headers[name] = _Header(file, tuple(view.get_shape()), view.get_dtype())
    return headers


def _files(path: Path) -> list[Path]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(
            f"model must hold model.safetensors or {index.name}, got {str(path)!r} without; "
            "save the weights as safetensors"
        )
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"index must be JSON with a weight_map, got {str(index)!r} ({error!r}); "
            "download it again"
        ) from error
    return [path / str(name) for name in sorted(files, key=str)]


def _check_tensors(
    path: Path, headers: dict[str, _Header], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Compare the files with the whole model; list everything that does not match."""
    # A tied head may be stored besides the embedding it repeats, and old files keep angles.
    surplus = {
        name
        for name in headers.keys() - shapes.keys()
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    }
    present = sorted(shapes.keys() & headers.keys())
    problems = {
        "missing": sorted(shapes.keys() - headers.keys()),
        "surplus": sorted(surplus),
        "misshapen": [
            f"{name} {list(headers[name].shape)} instead of {list(shapes[name])}"
            for name in present
            if headers[name].shape != shapes[name]
        ],
        "not floating point": [
            f"{name} {headers[name].dtype}" for name in present if headers[name].dtype not in DTYPES
        ],
    }
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"tensors of {str(path)!r} must be those that its config.json describes, "
            f"got {'; '.join(found)}; config.json and weights must come from the same model"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _copy(view: Any, header: _Header, held: Slices, target: Tensor) -> Iterator[int]:
    """Copy held rows in blocks, converting dtype and device on the way; yields bytes per block."""
    rows, *rest = held
    row_bytes = header.num_bytes((slice(0, 1), *rest))
    block_rows = max(1, BLOCK_BYTES // row_bytes)
    for start in range(rows.start, rows.stop, block_rows):
        stop = min(start + block_rows, rows.stop)
        target[start - rows.start : stop - rows.start].copy_(view[(slice(start, stop), *rest)])
        yield (stop - start) * row_bytes
