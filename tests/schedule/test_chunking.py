"""Claims about the chunk rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk


def _linear(fixed_s: float, token_s: float):
    return lambda num_tokens: fixed_s + token_s * num_tokens


@given(
    remaining=st.integers(1, 20_000),
    budget_ms=st.integers(1, 2_000),
    fixed_ms=st.integers(0, 300),
    token_us=st.integers(1, 5_000),
    min_chunk=st.sampled_from([1, 32, 64]),
)
def test_the_chunk_is_the_largest_that_fits(remaining, budget_ms, fixed_ms, token_us, min_chunk):
    predict = _linear(fixed_ms / 1e3, token_us / 1e6)
    budget_s = budget_ms / 1e3

    chunk = solve_chunk(predict, remaining=remaining, budget_s=budget_s, min_chunk=min_chunk)

    if chunk == 0:
        assert predict(min(min_chunk, remaining)) > budget_s
        return
    left = remaining - chunk
    assert left == 0 or left >= min_chunk
    if left:
        assert chunk <= 8192
        assert predict(chunk) <= budget_s
        assert chunk % 32 == 0 or chunk == min_chunk
        assert chunk + 32 > min(8192, remaining) - min_chunk or predict(chunk + 32) > budget_s
    else:
        assert predict(max(1, chunk - min_chunk)) <= budget_s


def test_no_tail_smaller_than_the_minimum_is_left():
    chunk = solve_chunk(_linear(0, 1e-3), remaining=192 + 20, budget_s=0.193, min_chunk=32)

    assert chunk == 212


def test_a_lone_prefill_takes_larger_chunks_when_steps_cost_more():
    cheap = solve_lone_chunk(_linear(0.001, 1e-3), remaining=100_000)
    dear = solve_lone_chunk(_linear(0.1, 1e-3), remaining=100_000)

    assert cheap == 64
    assert dear == 4096


@pytest.mark.parametrize("remaining", [1, 31, 33, 8192, 8200])
def test_a_lone_prefill_ends(remaining):
    left, chunks = remaining, 0
    while left:
        left -= solve_lone_chunk(_linear(0.1, 1e-4), remaining=left)
        chunks += 1

    assert left == 0
    assert chunks <= 2
