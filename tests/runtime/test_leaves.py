"""A rank's leaves come back to other pages as they were, and no step waits for the disk."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne.cache.leaf_copies import LeafCopies
from mnemosyne.cache.leaf_file import Leaf, Span, file_name
from mnemosyne.cache.leaf_folder import LeafFolder
from mnemosyne.cache.leaf_storage import Storage
from mnemosyne.cache.pages import PagePool
from mnemosyne.cache.table import PageTable
from mnemosyne.runtime import leaves as rooms
from mnemosyne.runtime.leaves import RankLeaves
from mnemosyne.schedule.plan import Fetch, Restore, Save, SaveFrom
from tests.leaves import LAYOUT, WHOLE, chain_of_leaves

PAGE_SIZE = 3
LEAVES = chain_of_leaves(4)
IDS = np.concatenate([np.frombuffer(leaf.ids, "<i4") for leaf in LEAVES]).astype(np.int64)
PAGES = np.array([7, 3, 4, 5, 9, 11, 10, 2, 1, 0, 6], dtype=np.int64)


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[RankLeaves]:
    found = open_rank(tmp_path)
    yield found
    found.close()


def open_rank(path: Path, device: str = "cpu") -> RankLeaves:
    pool = PagePool(
        num_pages=12,
        page_size=PAGE_SIZE,
        num_layers=LAYOUT.num_layers,
        num_kv_heads=LAYOUT.num_heads,
        head_dim=LAYOUT.head_dim,
        dtype=torch.float32,
        device=torch.device(device),
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in (*pool.k, *pool.v):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    copies = LeafCopies(pool, Span(0, LAYOUT.num_layers), Span(0, LAYOUT.num_heads))
    return RankLeaves(LeafFolder(Storage(path), LAYOUT, 1 << 20), copies)


def save_of(leaf: Leaf) -> Save:
    first, stop = leaf.start // PAGE_SIZE, -(-(leaf.start + LAYOUT.leaf_tokens) // PAGE_SIZE)
    offset = leaf.start - first * PAGE_SIZE
    pages = tuple(PAGES[first:stop].tolist())
    source = SaveFrom(0, 0, LAYOUT.leaf_tokens, pages, offset)
    return Save(leaf.digest, leaf.before, leaf.start, leaf.ids, (source,))


def keys_at(rank: RankLeaves, pages: np.ndarray) -> torch.Tensor:
    """Keys and values of all positions, in order."""
    pool = rank._copies.pool
    slots = (torch.from_numpy(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).ravel()
    return torch.stack([tensor.cpu()[:, slots[: len(IDS)]] for tensor in (*pool.k, *pool.v)])


def fetch_of(rank: RankLeaves) -> Fetch:
    digests = tuple(leaf.digest for leaf in LEAVES)
    parts = tuple(rank.folder.parts(digest) for digest in digests)
    return Fetch(1, 0, LEAVES[0].before, digests, parts)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_copied_comes_back_to_other_pages_by_pieces(tmp_path: Path, device: str) -> None:
    first = open_rank(tmp_path, device)
    written = keys_at(first, PAGES)
    for leaf in LEAVES:
        first.save(save_of(leaf))
    for tensor in (*first._copies.pool.k, *first._copies.pool.v):
        tensor.zero_()  # copies were taken
    first.close()
    second, others = open_rank(tmp_path, device), PAGES[::-1].copy()
    table = PageTable.on(0, others)
    before = keys_at(second, others)

    second.fetch(fetch_of(second), IDS, table)
    counts = [second.restore(Restore(1, *piece, 5), table) for piece in ((0, 1), (1, 4))]
    second.close()

    assert counts == [1, 3]
    restored = keys_at(second, others)
    assert torch.equal(restored[:, :, 5:], written[:, :, 5:])
    assert torch.equal(restored[:, :, :5], before[:, :, :5])  # it is there already


def test_leaves_go_to_the_device_of_the_pages(tmp_path: Path, rank: RankLeaves) -> None:
    for leaf in LEAVES:
        rank.save(save_of(leaf))
    rank.close()
    elsewhere, table = open_rank(tmp_path, "meta"), PageTable.on(0, PAGES)

    elsewhere.fetch(fetch_of(elsewhere), IDS, table)
    count = elsewhere.restore(Restore(1, 0, 4, 0), table)
    elsewhere.close()

    assert count == 4


def test_nothing_behind_a_leaf_that_is_not_whole_is_restored(
    tmp_path: Path, rank: RankLeaves
) -> None:
    for leaf in LEAVES:
        rank.save(save_of(leaf))
    rank.close()
    other = open_rank(tmp_path)
    table, fetch = PageTable.on(0, PAGES), fetch_of(other)
    (file,) = tmp_path.glob(f"*{LEAVES[2].digest.hex()}*")
    file.write_bytes(file.read_bytes()[:-1])

    other.fetch(fetch, IDS, table)
    counts = [other.restore(Restore(1, *piece, 0), table) for piece in ((0, 3), (3, 4))]
    other.close()

    assert counts == [2, 0]
    assert not file.exists()


def test_leaves_of_other_tokens_are_never_restored(rank: RankLeaves) -> None:
    for leaf in LEAVES:
        rank.save(save_of(leaf))
    while not all(rank.folder.has(leaf.digest) for leaf in LEAVES):
        time.sleep(0.01)
    table = PageTable.on(0, PAGES)

    rank.fetch(fetch_of(rank), IDS + 1, table)

    assert rank.restore(Restore(1, 0, 4, 0), table) == 0


def test_a_disk_that_is_too_slow_loses_leaves_and_no_time(
    rank: RankLeaves, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "QUEUED_BYTES", rank.local_bytes - 1)

    rank.save(save_of(LEAVES[0]))

    assert rank.num_room == 0
    assert rank.folder.counts.leaves_skipped == 1


def test_what_waits_to_be_written_is_cleared_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = open_rank(tmp_path)
    write, began, may_end = rank.folder.write, threading.Event(), threading.Event()

    def slow(*args: Any) -> bool:
        began.set()
        assert may_end.wait(60)
        return write(*args)

    monkeypatch.setattr(rank.folder, "write", slow)
    for leaf in LEAVES[:3]:  # one is being written, two wait
        rank.save(save_of(leaf))
    assert began.wait(60)
    clearing = threading.Thread(target=rank.clear)
    clearing.start()
    may_end.set()
    clearing.join()
    rank.save(save_of(LEAVES[3]))
    rank.close()

    files = [path.name for path in tmp_path.glob("*.safetensors")]
    assert files == [file_name(LAYOUT, LEAVES[3].digest, WHOLE)]
    assert rank.folder.counts.leaves_skipped == 0


def test_an_idle_rank_sees_what_others_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "IDLE_S", 0.01)
    monkeypatch.setattr("mnemosyne.cache.leaf_folder.RENEWED_S", 0.0)
    idle, busy = open_rank(tmp_path), open_rank(tmp_path)

    busy.save(save_of(LEAVES[0]))
    busy.close()
    end_s = time.monotonic() + 60
    while not idle.folder.has(LEAVES[0].digest) and time.monotonic() < end_s:
        time.sleep(0.01)
    idle.close()

    assert idle.folder.has(LEAVES[0].digest)
