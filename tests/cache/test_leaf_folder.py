"""A folder of leaves is bounded, shared and healed, whatever happens to its files."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from mnemosyne.cache.leaf_file import Leaf, Part, Span, file_name
from mnemosyne.cache.leaf_folder import LeafFolder, is_whole
from mnemosyne.cache.leaf_storage import UNFINISHED, Storage
from tests.leaves import LAYOUT, WHOLE, chain_of_leaves, pieces_of
from tools.damage_leaves import FaultyStorage

LEAVES = chain_of_leaves(6)
LEFT, RIGHT = (Part(Span(0, 3), Span(head, head + 1), Span(0, 8)) for head in (0, 1))


def open_folder(path: Path, max_bytes: int = 1 << 20, storage: Storage | None = None) -> LeafFolder:
    return LeafFolder(storage or Storage(path), LAYOUT, max_bytes)


def fill(folder: LeafFolder, leaves: list[Leaf] = LEAVES) -> list[bool]:
    return [folder.write(leaf, WHOLE, pieces_of(WHOLE), page_size=16) for leaf in leaves]


def is_read(folder: LeafFolder, leaf: Leaf) -> bool:
    """Read a leaf, if it is said to be there; whether it was, and is as it was written."""
    if not folder.has(leaf.digest):
        return False
    pieces = folder.read(leaf, folder.parts(leaf.digest), WHOLE)
    if pieces is None:
        return False
    assert [bytes(p.data) for p in pieces] == [bytes(p) for p in pieces_of(WHOLE)]
    return True


def path_of(path: Path, leaf: Leaf, part: Part = WHOLE) -> Path:
    return path / file_name(LAYOUT, leaf.digest, part)


def test_a_leaf_is_there_once_all_of_its_parts_are(tmp_path: Path) -> None:
    folder, leaf = open_folder(tmp_path), LEAVES[0]

    folder.write(leaf, LEFT, pieces_of(LEFT), page_size=16)
    assert not folder.has(leaf.digest)
    folder.write(leaf, RIGHT, pieces_of(RIGHT), page_size=16)

    assert folder.has(leaf.digest)
    pieces = folder.read(leaf, folder.parts(leaf.digest), WHOLE)
    assert pieces is not None
    assert len(pieces) == 2 * 3 * 2
    assert open_folder(tmp_path).has(leaf.digest)


def test_parts_of_several_meshes_make_a_whole() -> None:
    low, high = (Part(Span(*layers), Span(0, 2), Span(0, 8)) for layers in ((0, 2), (2, 3)))
    early, late = (Part(Span(0, 3), Span(0, 2), Span(*tokens)) for tokens in ((0, 5), (5, 8)))

    assert is_whole(LAYOUT, [low, high])
    assert is_whole(LAYOUT, [early, late])
    assert is_whole(LAYOUT, [low, Part(Span(2, 3), LEFT.heads, Span(0, 8)), RIGHT])
    assert not is_whole(LAYOUT, [low, late])
    assert not is_whole(LAYOUT, [LEFT])


def test_a_leaf_of_which_only_some_parts_are_named_is_not_read(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    for leaf in LEAVES[:3]:
        for part in (LEFT, RIGHT):
            folder.write(leaf, part, pieces_of(part), page_size=16)

    # others may remove files between the look at a leaf and the look at its parts
    assert folder.read(LEAVES[0], (), WHOLE) is None
    assert folder.read(LEAVES[1], (str(LEFT),), WHOLE) is None
    assert folder.read(LEAVES[2], (str(LEFT),), RIGHT) is None

    assert not any(folder.has(leaf.digest) for leaf in LEAVES[:3])


def test_what_was_used_longest_ago_goes_first_from_the_ends_of_chains(tmp_path: Path) -> None:
    one, other = chain_of_leaves(3, seed=1), chain_of_leaves(3, seed=2)
    folder = open_folder(tmp_path)
    fill(folder, one)
    size = path_of(tmp_path, one[0]).stat().st_size
    folder = open_folder(tmp_path, max_bytes=int(5.9 * size))
    fill(folder, other[:2])
    folder.note_used([leaf.digest for leaf in other[:2]])
    folder.note_used([leaf.digest for leaf in one])

    fill(folder, other[2:])

    assert [folder.has(leaf.digest) for leaf in one] == [True, True, True]
    assert [folder.has(leaf.digest) for leaf in other] == [True, False, True]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 5.9 * size


def test_a_leaf_that_no_folder_of_this_size_holds_is_not_written(tmp_path: Path) -> None:
    folder = open_folder(tmp_path, max_bytes=100)

    assert fill(folder) == [False] * 6
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_damaged_file_is_told_once_removed_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(open_folder(tmp_path))
    damaged = path_of(tmp_path, LEAVES[2])
    damaged.write_bytes(damaged.read_bytes()[:-9])
    folder = open_folder(tmp_path)

    found = [[is_read(folder, leaf) for leaf in LEAVES] for _ in range(2)]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]

    assert found == [[True, True, False, True, True, True]] * 2
    assert len(told) == folder.counts.files_refused == 1
    assert damaged.name in told[0]
    assert "it is cut short" in told[0]
    assert fill(folder) == [True] * 6
    assert all(is_read(open_folder(tmp_path), leaf) for leaf in LEAVES)


def test_a_damaged_file_that_cannot_be_removed_is_not_read_again(tmp_path: Path) -> None:
    class Stuck(Storage):
        def remove(self, name: str) -> None:
            raise PermissionError(errno.EACCES, "no")

    fill(open_folder(tmp_path))
    path_of(tmp_path, LEAVES[0]).write_bytes(b"?")
    folder = open_folder(tmp_path, storage=Stuck(tmp_path))

    assert not is_read(folder, LEAVES[0])
    folder._renewed_s = 0.0
    folder.renew()

    assert not folder.has(LEAVES[0].digest)
    assert fill(folder, LEAVES[:1]) == [True]
    assert is_read(folder, LEAVES[0])


def test_files_that_others_remove_or_write_meanwhile_are_no_damage(tmp_path: Path) -> None:
    ours, theirs = open_folder(tmp_path), open_folder(tmp_path)
    fill(ours, LEAVES[:2])
    path_of(tmp_path, LEAVES[0]).unlink()
    fill(theirs, LEAVES[2:3])

    assert [is_read(ours, leaf) for leaf in LEAVES[:3]] == [False, True, False]
    ours._renewed_s = 0.0
    ours.renew()

    assert is_read(ours, LEAVES[2])
    assert ours.counts.files_refused == 0


def test_a_full_disk_costs_no_more_than_a_pause(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = open_folder(tmp_path, storage=FaultyStorage(tmp_path, 17, errno.ENOSPC))

    written = fill(folder)
    told = [r.getMessage() for r in caplog.records]
    folder._paused_s = 0.0

    assert written == [True, False, False, False, False, False]
    assert len(told) == 1
    assert os.strerror(errno.ENOSPC) in told[0]
    assert not list(tmp_path.glob(f"{UNFINISHED}*"))
    assert fill(folder) == [True] * 6


def test_power_may_be_cut_at_any_moment(tmp_path: Path) -> None:
    counting = FaultyStorage(tmp_path, None)
    fill(open_folder(tmp_path, storage=counting), LEAVES[:2])
    num_operations = counting.num_operations
    for fails_at in range(num_operations):
        path = tmp_path / str(fails_at)
        path.mkdir()
        fill(open_folder(path, storage=FaultyStorage(path, fails_at)), LEAVES[:2])
        for file in path.iterdir():
            os.utime(file, (0, 0))

        folder = open_folder(path)
        found = [is_read(folder, leaf) for leaf in LEAVES[:2]]

        assert found == [fails_at >= num_operations // 2, False]
        assert not list(path.glob(f"{UNFINISHED}*"))
        assert fill(folder, LEAVES[:2]) == [True, True]
        assert all(is_read(open_folder(path), leaf) for leaf in LEAVES[:2])


def test_an_unfinished_file_stays_while_somebody_writes_it(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with storage.locked(f"{UNFINISHED}1-ab"):
        (tmp_path / f"{UNFINISHED}2-cd").touch()
        for name in (f"{UNFINISHED}1-ab", f"{UNFINISHED}2-cd"):
            os.utime(tmp_path / name, (0, 0))

        open_folder(tmp_path)

    assert [file.name for file in tmp_path.iterdir()] == [f"{UNFINISHED}1-ab"]


def test_files_of_other_models_are_counted_and_left_alone(tmp_path: Path) -> None:
    fill(open_folder(tmp_path), LEAVES[:1])
    path_of(tmp_path, LEAVES[0]).rename(
        tmp_path / path_of(tmp_path, LEAVES[0]).name.replace("ab", "cd")
    )
    folder = open_folder(tmp_path)

    folder.clear()

    assert "1 files of others" in folder.describe()
    assert len(list(tmp_path.iterdir())) == 1
