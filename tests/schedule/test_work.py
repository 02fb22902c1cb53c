"""Claims about the work that a step is counted as."""

import numpy as np
import pytest

from mnemosyne.cache.table import PageTable
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.work import DecodeTally, StepWork, WorkModel


@pytest.mark.parametrize("window", [None, 1, 5, 40, 10**6])
@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1), (0, 33), (7, 64), (100, 1), (39, 2)])
@pytest.mark.parametrize("keys", [None, range(0, 20), range(20, 41), range(35, 200)])
def test_pairs_are_the_keys_that_rows_see(window, start, num_tokens, keys):
    local = range(start + num_tokens) if keys is None else keys
    counted = sum(
        len([key for key in local if key <= position and (not window or key > position - window)])
        for position in range(start, start + num_tokens)
    )

    work = WorkModel([window]).chunk(start, num_tokens, samples=False, is_decode=False, keys=keys)

    assert work.prefill_pairs == counted


def _table(*groups: int, tokens_each: int = 60) -> PageTable:
    pages = np.zeros(4, dtype=np.int64)
    return PageTable.spread([(group, pages) for group in groups], tokens_each)


def test_layers_of_different_windows_are_averaged():
    model = WorkModel([None, 4])

    (work,) = model.add(model.nothing, Chunk(0, 49, 1, samples=True, token_id=5), _table(0))

    assert work.decode_keys == (50 + 4) / 2
    assert (work.num_tokens, work.num_sequences, work.num_sampled) == (1, 1, 1)


def test_active_groups_share_the_keys_and_repeat_the_rows():
    model = WorkModel([None], num_groups=4)

    work = model.add(model.nothing, Chunk(0, 100, 10, samples=False), _table(2, 0, 1))

    assert [part.num_tokens for part in work] == [10, 0, 10, 0]
    assert work[2].prefill_pairs == 10 * 60
    assert work[0].prefill_pairs == sum(range(41, 51))
    assert work[1] == work[3] == StepWork()


@pytest.mark.parametrize("windows", [(None,), (None, 100)])
@pytest.mark.parametrize("unread_share", [1.0, 0.5])
def test_one_more_prefill_chunk_adds_its_work(windows, unread_share):
    model = WorkModel(windows, unread_share=unread_share)
    part = model.chunk(500, 1, samples=True, is_decode=True)

    for start, size, samples, keys in ((0, 64, True, None), (300, 32, False, range(200))):
        own = model.chunk(
            start, size, samples=samples, is_decode=False, keys=keys, is_shared=keys is not None
        )
        assert model.with_prefill(part, start, size, samples, keys) == part + own


@pytest.mark.parametrize("unread_share", [1.0, 0.5])
def test_decodes_together_are_the_sum_of_decodes_one_by_one(unread_share):
    model = WorkModel((None, 100), num_groups=2, unread_share=unread_share)
    alone, shared = _table(1), _table(0, 1, tokens_each=1000)
    rows = [(5, alone), (700, alone), (400, shared), (1500, shared)]

    work = model.nothing
    for position, table in rows:
        chunk = Chunk(0, position, 1, samples=True, token_id=3)
        work = model.add(work, chunk, table)

    tally = DecodeTally(model)
    tally.add([*rows, (9, alone), (800, shared)])
    tally.add([(9, alone), (800, shared)], sign=-1)
    assert tally.work() == work
    assert [part.num_exchanged for part in work] == [1, 1]


def test_each_row_reads_its_share_of_the_experts_that_are_still_unread():
    model = WorkModel((None,), unread_share=0.75)

    work = model.chunk(10, 3, samples=False, is_decode=False)

    assert work.features()[-1] == 1 - 0.75**3
    assert StepWork().features()[-1] == 0


def test_rows_of_a_dense_model_have_no_experts_to_read():
    work = WorkModel((None,)).chunk(0, 4096, samples=False, is_decode=False)

    assert work.features()[-1] == 0


def test_seconds_are_features_times_rates():
    work = StepWork(7, 5e3, 3e4, 4, 2, 6, 0.25)
    rates = np.random.default_rng(0).uniform(0, 1, len(work.features()))

    assert work.seconds(rates.tolist()) == pytest.approx(float(rates @ work.features()))
