"""Headers of a checkpoint's files, checked: the place and shape of each tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mnemosyne.files import is_there, parse_object, printable, read_object, shown
from mnemosyne.parallel.shards import Slices

PACKED = "U8"  # of numbers that are narrower than a byte, and of their scales
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of files, with bytes per element
PACKED_ENDS = ("_blocks", "_scales")
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
MAX_HEADER_BYTES = 32 << 20  # 200,000 tensors have such a one
NAMES_SHOWN = 20  # per kind of mismatch; the rest is counted
COMPARED_ROWS_BYTES = 4 << 20  # at once, of a head and its embedding

log = logging.getLogger(__name__)


class Header(NamedTuple):
    """The entry of one tensor in a file's header."""

    file: Path
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str
    num_stored: int  # bytes

    def num_bytes(self, held: Slices) -> int:
        """Bytes in the file of a part of the tensor."""
        return math.prod(part.stop - part.start for part in held) * DTYPES.get(self.dtype, 1)


def read_headers(path: Path, known_name: Callable[[str], str | None] = str) -> dict[str, Header]:
    """Headers of all files of a checkpoint, by tensor name; no weight is read.

    Args:
        path: directory with ``model.safetensors``, or shards and ``model.safetensors.index.json``,
            which says in which shard each tensor lies.
        known_name: by which name the model knows a stored tensor; None if it does not use it.

    Raises:
        ValueError: if a file is missing, truncated or not safetensors, if both forms are there, or
            if index and shards do not say the same, or if two tensors are known by one name.
    """
    headers: dict[str, Header] = {}
    for header in _read_stored(path):
        name = known_name(header.name)
        if name is not None and name in headers:
            raise ValueError(
                f"{printable(name)} must be stored once in {shown(str(path), 400)}, got "
                f"{printable(headers[name].name)} and {printable(header.name)}; remove one of them"
            )
        if name is not None:
            headers[name] = header
    return headers


def _read_stored(path: Path) -> list[Header]:
    """Headers of all tensors of a checkpoint; see ``read_headers``."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if not is_there(index):
        if not is_there(single):
            raise ValueError(
                f"model must hold model.safetensors or {index.name}, got {shown(str(path), 400)} "
                "without; save the weights as safetensors"
            )
        return list(_read_header(single).values())
    places, total = _read_index(index)
    if single.name not in places.values() and is_there(single):
        raise ValueError(
            f"model must hold {single.name} or {index.name}, got both in "
            f"{shown(str(path), 400)}, and the index does not name the file; remove one of them"
        )
    shards = {name: _read_header(path / name) for name in sorted(set(places.values()))}
    _check_index(index, places, shards)
    headers = list({name: h for held in shards.values() for name, h in held.items()}.values())
    stored = sum(header.num_stored for header in headers)
    if total is not None and total != stored:  # published indices count wrongly; nothing reads it
        log.warning("%s counts %s bytes of weights, its files %d", index.name, shown(total), stored)
    return headers


def open_weights(file: Path) -> Any:
    """A file as a context manager; its header is checked, its size too, nothing else is read."""
    if not is_there(file):
        raise ValueError(f"weights file must exist, got {shown(str(file), 400)}; download it again")
    try:
        _check_header_length(file)
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights file must be whole and safetensors, got {shown(str(file), 400)} "
            f"({printable(error)}); download it again"
        ) from error


def check_tensors(
    path: Path,
    headers: dict[str, Header],
    shapes: dict[str, tuple[int, ...]],
    entries_of: Callable[[str], str] | None = None,
) -> None:
    """Compare the files with the whole model; list everything that does not match.

    Args:
        path: of the files.
        headers: of all their tensors.
        shapes: of all tensors that the model has.
        entries_of: gives the entries of config.json that the sizes of a tensor come from.

    Raises:
        ValueError: if tensors are missing, surplus, misshapen or of an integer dtype.
    """
    surplus = {name for name in headers.keys() - shapes.keys() if not _repeats(name)}
    present = sorted(shapes.keys() & headers.keys())
    problems = {
        "missing": sorted(shapes.keys() - headers.keys()),
        "surplus": sorted(surplus),
        "misshapen": [
            f"{name} {list(headers[name].shape)} instead of {list(shapes[name])}"
            + (f" ({entries_of(name)})" if entries_of else "")
            for name in present
            if headers[name].shape != shapes[name]
        ],
        "not floating point": [
            f"{name} {headers[name].dtype}"
            for name in present
            if headers[name].dtype not in DTYPES
            and not (headers[name].dtype == PACKED and name.endswith(PACKED_ENDS))
        ],
    }
    found = [f"{kind}: {_listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise ValueError(
            f"tensors of {shown(str(path), 400)} must be those that its config.json describes, "
            f"got {'; '.join(found)}; config.json and weights must come from the same model"
        )


def head_differs(headers: dict[str, Header]) -> bool:
    """Return whether a head is stored that is not the embedding over again, as a tied one is."""
    head, table = headers.get(HEAD), headers.get(EMBEDDING)
    if head is None or table is None or head.shape != table.shape or len(head.shape) != 2:
        return head is not None
    if not {head.dtype, table.dtype} <= DTYPES.keys():
        return True
    rows, width = head.shape
    block = max(1, COMPARED_ROWS_BYTES // max(1, width * DTYPES[head.dtype]))
    with open_weights(head.file) as heads, open_weights(table.file) as tables:
        parts = heads.get_slice(head.name), tables.get_slice(table.name)
        for start in range(0, rows, block):
            ours, theirs = (part[start : min(start + block, rows)] for part in parts)
            wide = torch.promote_types(ours.dtype, theirs.dtype)
            if not torch.equal(ours.to(wide), theirs.to(wide)):
                return True
    return False


def _repeats(name: str) -> bool:
    """Return whether a tensor may be left out: a tied head, or angles that old files keep."""
    return name == HEAD or name.endswith("rotary_emb.inv_freq")


def _read_header(file: Path) -> dict[str, Header]:
    with open_weights(file):  # the library holds shapes, offsets and the size against each other
        pass
    with file.open("rb") as opened:
        text = opened.read(int.from_bytes(opened.read(8), "little")).decode()
    entries = parse_object(text, printable(file))
    return {
        name: Header(
            file,
            name,
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            num_stored=entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }


def _check_header_length(file: Path) -> None:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise SafetensorError(f"a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")


def _read_index(index: Path) -> tuple[dict[str, str], object]:
    """File name by tensor name, files in the folder of the index; and the bytes it counts."""
    entries = read_object(index, MAX_HEADER_BYTES)
    places, metadata = entries.get("weight_map"), entries.get("metadata") or {}
    where = f"in {printable(index)} must"
    if not isinstance(places, dict) or not places:
        raise ValueError(
            f"weight_map {where} name the file of each tensor, got {shown(places)}; "
            "download it again"
        )
    if not isinstance(metadata, dict):
        raise ValueError(f"metadata {where} be an object, got {shown(metadata)}; drop it")
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise ValueError(
                f"weight_map.{printable(name)} {where} be the name of a file beside it, "
                f"got {shown(file)}; download it again"
            )
    return places, metadata.get("total_size")


def _check_index(index: Path, places: dict[str, str], shards: dict[str, dict[str, Header]]) -> None:
    lacking = [
        f"{printable(name)} in {printable(file)}, which lacks it"
        for name, file in places.items()
        if name not in shards[file]
    ]
    elsewhere = [
        f"{printable(name)} also in {printable(file)}"
        if name in places
        else f"{printable(name)} of {printable(file)} nowhere"
        for file, held in shards.items()
        for name in held
        if places.get(name) != file and not name.endswith("rotary_emb.inv_freq")
    ]
    if lacking or elsewhere:
        raise ValueError(
            f"{printable(index)} must say where each tensor lies, as the files do, "
            f"got {_listed(sorted(lacking) + sorted(elsewhere))}; save or download all of it again"
        )


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_SHOWN
    listed = ", ".join(printable(name) for name in names[:NAMES_SHOWN])
    return listed + (f" and {more} more" if more > 0 else "")
