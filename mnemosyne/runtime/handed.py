"""Which rows of a step a group hands to others and takes from them, by the plan alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mnemosyne.attention.handing import Handed, HandedRows
from mnemosyne.cache.layout import slots_of
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.schedule.plan import Plan, handovers


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
    sent, received = list[Handed](), list[Handed]()
    for chunk, receiver, is_needed in handovers(plan.chunks, lambda i: sequences[i].table):
        if group not in (chunk.group, receiver):
            continue
        pages = sequences[chunk.request_id].table.pages_on(group)
        slots = slots_of(pages, chunk.start, chunk.num_tokens, page_size)
        peer = receiver if group == chunk.group else chunk.group
        assert peer is not None, "a slice has its group"
        where = peer, torch.from_numpy(slots).to(device)
        handed = Handed(chunk.request_id, chunk.start, *where, is_needed)
        (sent if group == chunk.group else received).append(handed)
    return HandedRows(tuple(sent), tuple(received)) if sent or received else None
