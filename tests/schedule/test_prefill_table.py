"""Claims about the predicted time of whole prompts."""

import numpy as np
import pytest

from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk
from mnemosyne.schedule.prefill_table import PrefillTable


def _table(predict, **options) -> PrefillTable:
    return PrefillTable(
        lambda *work: work,
        lambda work: predict(*work),
        **{"min_chunk": 32, "max_chunk": 1024, **options},
    )


def _attention_s(start: int, num_tokens: int) -> float:
    return 0.01 + 1e-4 * num_tokens + 1e-8 * (num_tokens * start + num_tokens**2 / 2)


def test_the_table_adds_up_chunks_and_interpolates():
    table = _table(lambda start, size: 0.1 + 1e-3 * size)

    assert table.seconds(0, 1024) == pytest.approx(1.124)
    assert table.seconds(0, 2048) == pytest.approx(2 * 1.124)
    assert table.seconds(512, 1024) == pytest.approx(1.124 / 2)
    assert table.seconds(2048, 2048) == 0.0


def test_a_million_tokens_take_what_their_chunks_take_one_by_one():
    table, done, seconds = _table(_attention_s), 0, 0.0

    while done < 10**6:
        chunk = solve_lone_chunk(
            lambda size, start=done: _attention_s(start, size),
            remaining=10**6 - done,
            max_chunk=1024,
        )
        seconds += _attention_s(done, chunk)
        done += chunk

    assert table.seconds(0, 10**6) == pytest.approx(seconds, rel=0.01)


def test_ten_million_tokens_ask_the_predictor_a_thousand_times_at_most():
    calls = []

    def predict(start: int, num_tokens: int) -> float:
        calls.append(start)
        return _attention_s(start, num_tokens)

    _table(predict, max_chunk=8192).seconds(0, 10**7)

    assert len(calls) < 1000


def test_stages_work_on_several_chunks_at_a_time():
    assert _table(_attention_s, depth=4).seconds(0, 5000) == pytest.approx(
        _table(_attention_s).seconds(0, 5000) / 4
    )


def test_the_table_follows_a_machine_that_becomes_slower():
    speed = [1.0]
    table = _table(lambda start, size: speed[0] * _attention_s(start, size))
    before = table.seconds(0, 3000)

    speed[0] = 2.0

    assert table.seconds(0, 3000) == pytest.approx(2 * before)


def test_the_table_is_made_anew_when_far_chunks_turn_out_dearer():
    dearer = [1.0]

    def predict(start: int, num_tokens: int) -> float:
        return _attention_s(start, num_tokens) + dearer[0] * 1e-8 * num_tokens * start

    table = _table(predict)
    table.seconds(0, 100_000)
    version = table.version

    dearer[0] = 2.0

    expected = _table(predict).seconds(0, 100_000)
    assert table.seconds(0, 100_000) == pytest.approx(expected)
    assert table.version > version


def test_a_table_made_before_anything_is_known_is_made_again():
    known = [0.0]
    table = _table(lambda start, size: known[0] * size)
    assert table.seconds(0, 3000) == 0.0

    known[0] = 1e-3

    assert table.seconds(0, 3000) == pytest.approx(3.0)
    assert np.allclose(table.until(np.array([0, 1500])), [0.0, 1.5])


def test_a_table_made_anew_still_reaches_the_longest_prompt():
    dearer = [1.0]

    def predict(start: int, size: int) -> float:
        return _attention_s(start, size) * (dearer[0] if start else 1.0)

    table = _table(predict)
    table.extend(100_000)

    dearer[0] = 2.0
    table.extend(2000)

    fresh = _table(predict)
    fresh.extend(100_000)
    for num_tokens in (0, 700, 2000, 100_000):
        assert table.at(num_tokens) == pytest.approx(fresh.at(num_tokens))
        assert table.at(num_tokens) == pytest.approx(table.until(np.array([num_tokens]))[0])


@pytest.mark.parametrize("depth", [2, 4, 16])
@pytest.mark.parametrize("total", [900, 5000, 100_000])
def test_chunks_of_a_lone_prompt_take_equally_long_and_leave_no_sliver(depth, total):
    table, done, times_s = _table(_attention_s, depth=depth, max_chunk=8192), 0, []

    while done < total:
        pace_s = table.pace(done, total)
        size = solve_chunk(
            lambda size, start=done: _attention_s(start, size),
            remaining=total - done,
            budget_s=pace_s,
        )
        times_s.append(_attention_s(done, size))
        done += size

    assert len(times_s) > 1
    assert max(times_s) < 1.3 * np.mean(times_s)
    assert min(times_s) > 0.6 * np.mean(times_s)


def test_the_pace_follows_a_machine_that_becomes_slower():
    speed = [1.0]
    table = _table(lambda start, size: speed[0] * _attention_s(start, size), depth=4)
    before = table.pace(0, 50_000)

    speed[0] = 2.0

    assert table.pace(0, 50_000) == pytest.approx(2 * before)


def test_no_step_of_a_lone_prompt_takes_longer_than_a_newcomer_may_wait():
    table = _table(_attention_s, depth=4, max_chunk=8192)
    longest_s = max(table.pace(done, 100_000) for done in range(0, 90_000, 1000))

    bounded_s = [table.pace(done, 100_001, longest_s / 3) for done in range(0, 100_001, 1000)]

    assert max(bounded_s) == longest_s / 3
    assert min(bounded_s) > longest_s / 6
