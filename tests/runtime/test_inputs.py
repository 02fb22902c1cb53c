"""A plan as tensors: rows packed without gaps, and padded to few shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.cache.page_ids import PageIds
from mnemosyne.cache.table import Extent, PageTable
from mnemosyne.request import SamplingParams
from mnemosyne.runtime.inputs import StepInputs, bucket_size, build_inputs, count_rows
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.schedule.plan import Admission, Chunk, Plan

PAGE_SIZE = 4
PADDING_SLOT = 4000


def sequence(prompt_ids: list[int], pages: list[int]) -> SequenceState:
    return placed(prompt_ids, PageTable.on(0, np.array(pages)))


def spread(prompt_ids: list[int], shard_tokens: int) -> SequenceState:
    """A sequence over three groups."""
    pages = np.arange(shard_tokens // PAGE_SIZE)
    return placed(prompt_ids, PageTable.spread([(g, pages) for g in range(3)], shard_tokens))


def placed(prompt_ids: list[int], table: PageTable) -> SequenceState:
    state = SequenceState.start(
        Admission(
            request_id=0,
            prompt_ids=np.array(prompt_ids),
            params=SamplingParams(max_tokens=4),
            seed=0,
            end_token_ids=(),
        )
    )
    state.table = table
    return state


def ids_of(sequences: dict[int, SequenceState], group: int = 0) -> PageIds:
    page_ids = PageIds(16, torch.device("cpu"))
    for request_id, state in sequences.items():
        page_ids.enter(request_id, state.table.pages_on(group))
    return page_ids


def inputs_of(*chunks: Chunk, sequences: dict[int, SequenceState]) -> StepInputs:
    return build_inputs(
        Plan(index=0, chunks=chunks),
        sequences,
        page_size=PAGE_SIZE,
        padding_slot=PADDING_SLOT,
        page_ids=ids_of(sequences),
        device=torch.device("cpu"),
    )


def test_decodes_and_chunks_are_packed_one_after_the_other() -> None:
    decoding = sequence([10, 11, 12, 13, 14], pages=[7, 2])
    decoding.append(99, 5)
    prefilling = sequence(list(range(20, 32)), pages=[3, 9, 8])

    inputs = inputs_of(
        Chunk(0, 5, 1, samples=True, token_id=99),
        Chunk(1, 3, 6, samples=False),
        sequences={0: decoding, 1: prefilling},
    )

    assert inputs.token_ids_T.tolist() == [99, 23, 24, 25, 26, 27, 28, 0]
    assert inputs.positions_T.tolist() == [5, 3, 4, 5, 6, 7, 8, 0]
    expected = [2 * 4 + 1, 3 * 4 + 3, *(9 * 4 + i for i in range(4)), 8 * 4, PADDING_SLOT]
    assert inputs.slots_T.tolist() == expected
    assert [(placed.first_row, placed.last_row) for placed in inputs.chunks] == [(0, 0), (1, 6)]
    assert {t.dtype for t in (inputs.token_ids_T, inputs.positions_T, inputs.slots_T)} == {
        torch.int64
    }


def test_each_row_may_see_its_sequence_up_to_itself() -> None:
    prefilling = sequence(list(range(12)), pages=[3, 9, 8])

    inputs = inputs_of(Chunk(1, 3, 6, samples=False), sequences={1: prefilling})

    (segment,) = inputs.batch.segments
    assert (segment.first_row, segment.num_rows) == (0, 6)
    assert (segment.first_position, segment.first_key, segment.num_keys) == (3, 0, 9)
    np.testing.assert_array_equal(segment.pages, [3, 9, 8])
    assert inputs.batch.num_rows == 8
    assert inputs.batch.page_size == PAGE_SIZE


def test_positions_beyond_32_bits_of_elements_keep_their_slots() -> None:
    num_pages = 3
    far = 2**40
    state = sequence(list(range(12)), pages=[far, far + 1, 5][:num_pages])

    inputs = inputs_of(Chunk(1, 0, 12, samples=True), sequences={1: state})

    assert inputs.slots_T[:9].tolist() == [*range(far * 4, far * 4 + 8), 20]


def test_a_chunk_of_tokens_that_do_not_exist_is_a_bug() -> None:
    state = sequence([1, 2, 3], pages=[0, 1])

    with pytest.raises(AssertionError, match="only tokens that exist"):
        inputs_of(Chunk(1, 0, 4, samples=True), sequences={1: state})


def test_rows_that_other_groups_compute_too_are_a_batch_of_their_own() -> None:
    long = spread(list(range(12)), shard_tokens=4)
    short = sequence([1, 2, 3, 4, 5], pages=[6, 7])
    plan = Plan(0, (Chunk(0, 6, 2, samples=False), Chunk(1, 0, 5, samples=True)))

    sequences = {0: long, 1: short}

    by_group = [
        build_inputs(
            plan,
            sequences,
            group=group,
            num_groups=3,
            page_size=PAGE_SIZE,
            padding_slot=PADDING_SLOT,
            page_ids=ids_of(sequences, group),
            device=torch.device("cpu"),
        )
        for group in range(3)
    ]

    seen = [
        [
            [(s.first_row, s.num_rows, s.num_keys, s.first_key) for s in batch.segments]
            for batch in batches
        ]
        for batches in ((i.shared.batch, i.batch) for i in by_group if i.shared is not None)
    ]
    assert seen == [[[(0, 2, 4, 0)], [(2, 5, 5, 0)]], [[(0, 2, 4, 4)], []], [[], []]]
    assert [inputs.slots_T[:2].tolist() for inputs in by_group[:2]] == [[PADDING_SLOT] * 2, [2, 3]]
    tables = {0: long.table, 1: short.table}
    rows = [count_rows(plan, tables, group) for group in range(3)]
    assert rows == [len(inputs.token_ids_T) for inputs in by_group] == [8, 2, 1]


def lent(num_tokens: int) -> SequenceState:
    """A sequence at home on group 2, with copies on groups 0 and 1."""
    copies = tuple(Extent(group, 0, 10 * group + np.arange(5)) for group in range(2))
    table = PageTable((Extent(2, 0, np.arange(5)),), lent=copies)
    return placed(list(range(num_tokens)), table)


@pytest.mark.parametrize("ends", [True, False])
def test_slices_are_computed_apart_and_handed_to_whoever_still_reads_them(ends: bool) -> None:
    sequences = {1: lent(20)}
    stop = 20 if ends else 18
    cuts = [(0, 8, 14), (1, 14, 16), (2, 16, stop)]
    chunks = [Chunk(1, a, b - a, samples=b == 20, group=group) for group, a, b in cuts]
    plan = Plan(0, tuple(chunks))

    by_group = [
        build_inputs(
            plan,
            sequences,
            group=group,
            num_groups=3,
            page_size=PAGE_SIZE,
            padding_slot=PADDING_SLOT,
            page_ids=ids_of(sequences, group),
            device=torch.device("cpu"),
        )
        for group in range(3)
    ]

    for (group, start, stop), inputs in zip(cuts, by_group, strict=True):
        num_rows = stop - start
        assert inputs.shared is None
        assert inputs.positions_T[:num_rows].tolist() == list(range(start, stop))
        (segment,) = inputs.batch.segments
        assert (segment.num_rows, segment.num_keys, segment.first_key) == (num_rows, stop, 0)
        assert count_rows(plan, {1: sequences[1].table}, group) == len(inputs.token_ids_T)
    sent = {(g, h.start, h.peer) for g, i in enumerate(by_group) for h in i.handed.sent}
    came = {(h.peer, h.start, g) for g, i in enumerate(by_group) for h in i.handed.received}
    onward = {(0, 8, 1), (0, 8, 2), (1, 14, 2)}
    back = set() if ends else {(1, 14, 0), (2, 16, 0), (2, 16, 1)}
    assert sent == came == onward | back
    needed = {
        (h.peer, h.start, g)
        for g, i in enumerate(by_group)
        for h in i.handed.received
        if h.is_needed
    }
    assert needed == onward
    (first, *_) = by_group[1].handed.received
    assert first.slots_T.tolist() == [12 * 4 + i for i in range(4)] + [13 * 4 + i for i in range(2)]


def test_the_rows_of_a_step_can_be_counted_before_its_tokens_are_known() -> None:
    state = sequence([1, 2, 3], pages=[0, 1])
    plan = Plan(5, (Chunk(0, 3, 1, samples=True),))

    assert count_rows(plan, {0: state.table}, group=0) == 1


@given(num_tokens=st.integers(1, 2**24))
def test_padding_is_little_and_the_shape_holds_the_tokens(num_tokens: int) -> None:
    size = bucket_size(num_tokens)

    assert num_tokens <= size
    assert size - num_tokens <= max(7, num_tokens / 32)
    assert bucket_size(size) == size
    assert bucket_size(num_tokens + 1) >= size


def test_shapes_are_few() -> None:
    sizes = {bucket_size(num_tokens) for num_tokens in range(1, 8193)}

    assert {1, 2, 4, 8, 16, 8192} <= sizes
    assert len(sizes) <= 4 + 32 * 10
    assert len({size for size in sizes if 4096 < size <= 8192}) == 32
