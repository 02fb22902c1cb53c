"""The file of a leaf: keys and values of consecutive tokens, of some layers and heads, sealed.

It is a safetensors file. Its header is determined by its manifest, byte by byte, and the manifest
has a SHA-256 of itself and of every piece: the keys, or the values, of one head of one layer.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple, Self

from mnemosyne.cache.chain import ID_DTYPE

LEAF_TOKENS = 256
VERSION = 1
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEMSIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MAX_HEADER_BYTES = 32 << 20
PREFIX_BYTES = 8  # of a safetensors file, which say how long its header is

ReadAt = Callable[[int, int], bytearray]  # offset and size; fewer bytes at the end of the file


class DamagedLeaf(Exception):
    """A file whose content does not match its name; the text says why."""


class Span(NamedTuple):
    """Indices from ``first`` on, below ``stop``."""

    first: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.first

    def common(self, other: Span) -> Span:
        """The indices of both; empty if it does not end after it begins."""
        first = max(self.first, other.first)
        return Span(first, max(first, min(self.stop, other.stop)))


class Part(NamedTuple):
    """The part of a leaf that one file holds; tokens count from the leaf's first."""

    layers: Span
    heads: Span
    tokens: Span

    def __str__(self) -> str:
        return ".".join(f"{axis}{s.first}-{s.stop}" for axis, s in zip("lht", self, strict=True))

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The part of which ``text`` is the name, if it is one."""
        match = re.fullmatch(r"l(\d+)-(\d+)\.h(\d+)-(\d+)\.t(\d+)-(\d+)", text)
        if match is None:
            return None
        numbers = [int(number) for number in match.groups()]
        layers, heads, tokens = (Span(*numbers[at : at + 2]) for at in (0, 2, 4))
        return cls(layers, heads, tokens)


@dataclass(frozen=True, slots=True)
class Layout:
    """The numbers that files of one model have in common."""

    model: str  # SHA-256 of weights and all else that keys and values depend on, as hex
    name: str  # of the model, for people
    dtype: str  # of keys and values
    head_dim: int
    num_layers: int
    num_heads: int
    leaf_tokens: int = LEAF_TOKENS

    @property
    def piece_bytes(self) -> int:
        """Bytes of the keys of one head of one layer, of a whole leaf."""
        return self.leaf_tokens * self.head_dim * ITEMSIZES[self.dtype]

    @property
    def leaf_bytes(self) -> int:
        """Bytes of a leaf: keys and values of all layers and heads."""
        return 2 * self.num_layers * self.num_heads * self.piece_bytes


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of a chain: its digest and its tokens."""

    digest: bytes  # of all up to its end (see ``Chain``)
    before: bytes  # of all before it
    start: int  # position of its first token
    ids: bytes  # int32, little-endian

    @property
    def is_consistent(self) -> bool:
        """Return whether its digest follows from its tokens and from what is before it."""
        return sha256(self.before + self.ids).digest() == self.digest


class Piece(NamedTuple):
    """Verified keys or values of neighbouring heads of one layer."""

    layer: int
    is_value: bool
    heads: Span
    tokens: Span  # of the leaf
    data: memoryview  # [heads, tokens, head_dim]


def file_name(layout: Layout, digest: bytes, part: Part) -> str:
    """The name of a file: the beginning of its model's fingerprint, its digest, its part."""
    return f"{layout.model[:16]}-{digest.hex()}-{part}.safetensors"


def parse_name(name: str) -> tuple[str, bytes, Part] | None:
    """Model, digest and part of a file by its name, None if it is no leaf."""
    match = re.fullmatch(r"([0-9a-f]{16})-([0-9a-f]{64})-(.+)\.safetensors", name)
    part = None if match is None else Part.parse(match[3])
    return None if match is None or part is None else (match[1], bytes.fromhex(match[2]), part)


def encode(
    layout: Layout, leaf: Leaf, part: Part, pieces: Sequence[memoryview], page_size: int
) -> list[bytes | memoryview]:
    """The bytes of a file.

    Args:
        layout: of the model.
        leaf: whose part it is.
        part: what the file holds.
        pieces: keys, then values, ``[heads, tokens, head_dim]``, of each of its layers.
        page_size: of the cache that they come from.
    """
    num_heads = part.heads.size
    sums = [sha256(head).hexdigest() for piece in pieces for head in _cut(piece, num_heads)]
    ids = leaf.ids[part.tokens.first * ID_DTYPE.itemsize : part.tokens.stop * ID_DTYPE.itemsize]
    header = _header(layout, leaf, part, sums, page_size)
    return [len(header).to_bytes(PREFIX_BYTES, "little"), header, ids, *pieces]


def read(
    read_at: ReadAt, layout: Layout, leaf: Leaf, part: Part, wanted: Part
) -> Iterator[list[Piece]]:
    """Verified pieces of a file, layer by layer.

    Args:
        read_at: reads the file.
        layout: that it must have.
        leaf: that it must hold.
        part: that it must hold, as its name says.
        wanted: layers and heads to read; all of the tokens are read.

    Raises:
        DamagedLeaf: if it is torn, altered, or of another model, dtype or layout; before that,
            some pieces may have been given.
    """
    sums, offset = _open(read_at, layout, leaf, part)
    num_heads, width = part.heads.size, part.tokens.size * layout.head_dim
    head_bytes = width * ITEMSIZES[layout.dtype]
    layers, heads = part.layers.common(wanted.layers), part.heads.common(wanted.heads)
    for layer in range(layers.first, layers.stop):
        found = []
        for is_value in (False, True):
            place = (2 * (layer - part.layers.first) + is_value) * num_heads
            first = place + heads.first - part.heads.first
            size = heads.size * head_bytes
            data = memoryview(read_at(offset + first * head_bytes, size))
            if len(data) != size:
                raise DamagedLeaf("it is cut short")
            for index, head in enumerate(_cut(data, heads.size)):
                if sha256(head).hexdigest() != sums[first + index]:
                    kind = "values" if is_value else "keys"
                    raise DamagedLeaf(f"{kind} of layer {layer} are not as they were written")
            found.append(Piece(layer, is_value, heads, part.tokens, data))
        yield found


def _open(read_at: ReadAt, layout: Layout, leaf: Leaf, part: Part) -> tuple[list[str], int]:
    """Checksums of all pieces, and where the first one begins, once the header is verified."""
    size = int.from_bytes(read_at(0, PREFIX_BYTES), "little")
    if not 2 <= size <= MAX_HEADER_BYTES:
        raise DamagedLeaf("it does not begin as a safetensors file does")
    header = bytes(read_at(PREFIX_BYTES, size))
    manifest = _manifest(header)
    _check(manifest, layout, leaf, part)
    sums, page_size = manifest["checksums"], manifest.get("page_size")
    written = replace(layout, name=str(manifest.get("name")))
    if header != _header(written, leaf, part, sums, page_size):
        raise DamagedLeaf("its header is not as it was written")
    first, stop = (index * ID_DTYPE.itemsize for index in part.tokens)
    if bytes(read_at(PREFIX_BYTES + size, stop - first)) != leaf.ids[first:stop]:
        raise DamagedLeaf("it holds other tokens")
    return sums, PREFIX_BYTES + size + stop - first


def _manifest(header: bytes) -> dict[str, Any]:
    """The sealed manifest in a header."""
    try:
        metadata = json.loads(header)["__metadata__"]
        text, seal = metadata["manifest"], metadata["seal"]
        is_whole = sha256(text.encode()).hexdigest() == seal
        manifest = json.loads(text) if is_whole else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedLeaf("its header cannot be read") from error
    if not isinstance(manifest, dict):
        raise DamagedLeaf("its header is not as it was written")
    return manifest


def _check(manifest: dict[str, Any], layout: Layout, leaf: Leaf, part: Part) -> None:
    """Compare a manifest with the content that a file must have."""
    if manifest.get("version") != VERSION:
        raise DamagedLeaf("it is of another version")
    for key, value in asdict(layout).items():
        if key != "name" and manifest.get(key) != value:
            found = manifest.get("name" if key == "model" else key)
            raise DamagedLeaf(f"it is of another {key.replace('_', ' ')}: {found!r:.80}")
    if manifest.get("digest") != leaf.digest.hex() or manifest.get("start") != leaf.start:
        raise DamagedLeaf("it holds another prefix")
    sums, num_pieces = manifest.get("checksums"), 2 * part.layers.size * part.heads.size
    if not isinstance(sums, list) or len(sums) != num_pieces:
        raise DamagedLeaf("it holds other layers or heads")


def _header(
    layout: Layout, leaf: Leaf, part: Part, sums: Sequence[str], page_size: object
) -> bytes:
    """The header of a file, padded with spaces as safetensors asks for."""
    manifest = {
        "version": VERSION,
        **asdict(layout),
        "page_size": page_size,
        "start": leaf.start,
        "digest": leaf.digest.hex(),
        "before": leaf.before.hex(),
        **{axis: list(span) for axis, span in part._asdict().items()},
        "checksums": list(sums),
    }
    text = _compact(manifest)
    metadata = {"manifest": text, "seal": sha256(text.encode()).hexdigest()}
    offset = part.tokens.size * ID_DTYPE.itemsize
    entries: dict[str, Any] = {
        "__metadata__": metadata,
        "tokens": {"dtype": "I32", "shape": [part.tokens.size], "data_offsets": [0, offset]},
    }
    shape = [part.heads.size, part.tokens.size, layout.head_dim]
    num_bytes = math.prod(shape) * ITEMSIZES[layout.dtype]
    for layer in range(*part.layers):
        for kind in ("k", "v"):
            where = {"shape": shape, "data_offsets": [offset, offset + num_bytes]}
            entries[f"layers.{layer}.{kind}"] = {"dtype": DTYPES[layout.dtype], **where}
            offset += num_bytes
    header = _compact(entries).encode()
    return header + b" " * (-len(header) % PREFIX_BYTES)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _cut(data: memoryview, count: int) -> list[memoryview]:
    """Equal parts of some bytes."""
    size = len(data) // count
    return [data[index * size : (index + 1) * size] for index in range(count)]
