"""A file of a leaf gives what was written, or says why it does not."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load

from mnemosyne.cache.leaf_file import (
    DamagedLeaf,
    Layout,
    Leaf,
    Part,
    Piece,
    Span,
    encode,
    file_name,
    parse_name,
    read,
)
from tests.leaves import LAYOUT, WHOLE, chain_of_leaves, pieces_of

LEAF, OTHER = chain_of_leaves(2)


def file_of(part: Part = WHOLE, leaf: Leaf = LEAF, layout: Layout = LAYOUT) -> bytes:
    return b"".join(encode(layout, leaf, part, pieces_of(part), page_size=16))


def pieces_in(data: bytes, part: Part = WHOLE, wanted: Part = WHOLE) -> list[Piece]:
    def read_at(offset: int, size: int) -> bytearray:
        return bytearray(data[offset : offset + size])

    return [p for layer in read(read_at, LAYOUT, LEAF, part, wanted) for p in layer]


def why(data: bytes) -> str:
    with pytest.raises(DamagedLeaf) as raised:
        pieces_in(data)
    return str(raised.value)


def test_pieces_come_back_as_they_were_written() -> None:
    pieces = pieces_in(file_of())

    assert [bytes(p.data) for p in pieces] == [bytes(p) for p in pieces_of(WHOLE)]
    assert [(p.layer, p.is_value) for p in pieces][:3] == [(0, False), (0, True), (1, False)]


def test_a_rank_reads_its_layers_and_heads_alone() -> None:
    wanted = Part(Span(1, 2), Span(1, 2), Span(0, 8))

    keys, values = pieces_in(file_of(), wanted=wanted)

    written = np.stack([np.frombuffer(p, np.float32) for p in pieces_of(WHOLE)])
    written_LHN = written.reshape(6, 2, -1)
    assert np.array_equal(np.frombuffer(keys.data, np.float32), written_LHN[2, 1])
    assert np.array_equal(np.frombuffer(values.data, np.float32), written_LHN[3, 1])


def test_other_programs_can_read_it() -> None:
    tensors = load(file_of())

    assert tensors["layers.2.v"].shape == (2, 8, 4)
    assert tensors["tokens"].tobytes() == LEAF.ids
    assert bytes(pieces_of(WHOLE)[5]) == tensors["layers.2.v"].tobytes()


def test_no_bit_can_be_changed_unseen() -> None:
    data = file_of()

    for index in range(len(data)):
        changed = bytearray(data)
        changed[index] ^= 1 << index % 8
        assert why(bytes(changed)), f"byte {index} of {len(data)}"


def test_no_file_can_be_cut_short_unseen() -> None:
    data = file_of()

    reasons = {why(data[:size]) for size in range(0, len(data), 7)}

    assert "it is cut short" in reasons


def test_what_is_of_another_model_dtype_or_prefix_is_told() -> None:
    foreign = replace(LAYOUT, model="cd" * 32, name="another")

    assert why(file_of(layout=foreign)) == "it is of another model: 'another'"
    assert "dtype" in why(file_of(layout=replace(LAYOUT, dtype="float64")))
    assert "leaf tokens" in why(file_of(layout=replace(LAYOUT, leaf_tokens=16)))
    assert why(file_of(leaf=OTHER)) == "it holds another prefix"
    assert why(file_of(leaf=replace(LEAF, ids=OTHER.ids))) != ""
    part = Part(Span(0, 3), Span(0, 1), Span(0, 8))
    assert why(file_of(part)) == "it holds other layers or heads"


def test_sums_that_fit_changed_pieces_do_not_open_a_file() -> None:
    data = file_of()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    manifest = json.loads(header["__metadata__"]["manifest"])
    manifest["checksums"].reverse()
    header["__metadata__"]["manifest"] = json.dumps(manifest, separators=(",", ":"))
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(size)

    assert why(len(changed).to_bytes(8, "little") + changed + data[8 + size :]) != ""


def test_names_say_what_files_hold() -> None:
    name = file_name(LAYOUT, LEAF.digest, WHOLE)

    assert parse_name(name) == ("ab" * 8, LEAF.digest, WHOLE)
    assert name.endswith("-l0-3.h0-2.t0-8.safetensors")
    assert parse_name("notes.txt") is None
    assert parse_name(name.replace(".h0-2", "")) is None


def test_a_leaf_knows_whether_its_digest_is_of_its_tokens() -> None:
    assert LEAF.is_consistent
    assert not replace(LEAF, ids=OTHER.ids).is_consistent
