"""Which rows of a step a group hands to others and takes from them, by the plan alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch

from mnemosyne.attention.handing import Handed, HandedRows
from mnemosyne.cache.layout import slots_of
from mnemosyne.cache.table import PageTable
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.schedule.plan import Chunk, Plan


def handed_rows(
    plan: Plan,
    sequences: Mapping[int, SequenceState],
    *,
    group: int,
    page_size: int,
    device: torch.device,
) -> HandedRows | None:
    """The slices that pass between a group and others; None if none do.

    Args:
        plan: the step.
        sequences: state of every request in it.
        group: index on the kvp axis.
        page_size: tokens per page.
        device: where the slots go.
    """
    slices: dict[int, list[Chunk]] = {}
    for chunk in plan.chunks:
        if chunk.group is not None:
            slices.setdefault(chunk.request_id, []).append(chunk)
    sent, received = list[Handed](), list[Handed]()
    for request_id, chunks in slices.items():
        table = sequences[request_id].table
        _check(table, chunks)
        for index, chunk in enumerate(chunks):
            for receiver in _receivers(table, chunks, index):
                if group not in (chunk.group, receiver):
                    continue
                pages = table.pages_on(group)
                slots = slots_of(pages, chunk.start, chunk.num_tokens, page_size)
                is_needed = any(later.group == receiver for later in chunks[index + 1 :])
                peer = receiver if group == chunk.group else chunk.group
                assert peer is not None, "a slice has its group"
                slots_T = torch.from_numpy(slots).to(device)
                handed = Handed(request_id, chunk.start, peer, slots_T, is_needed)
                (sent if group == chunk.group else received).append(handed)
    return HandedRows(tuple(sent), tuple(received)) if sent or received else None


def _receivers(table: PageTable, chunks: list[Chunk], index: int) -> list[int]:
    """The groups that take a slice: all with a lane but its own.

    Copies are not read any more once the prompt ends: then only groups of later slices take it.
    """
    groups = [extent.group for extent in table.lanes if extent.group != chunks[index].group]
    if chunks[-1].samples:
        later = {chunk.group for chunk in chunks[index + 1 :]}
        groups = [group for group in groups if group in later]
    return groups


def _check(table: PageTable, chunks: list[Chunk]) -> None:
    """Slices follow one another, each on a group of its own; the last of a prompt is at home."""
    assert all(a.stop == b.start for a, b in pairwise(chunks)), "slices leave no gap"
    groups = [chunk.group for chunk in chunks]
    assert len(groups) == len(set(groups)), "a group has one slice of a chunk"
    assert not chunks[-1].samples or groups[-1] == table.reporter, "the home has all keys at last"
