"""Claims about the chunk rule."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk, solve_lone_count


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


@pytest.mark.parametrize(
    ("remaining", "budget_s", "chunk"),
    [
        (192 + 20, 0.220, 212),  # the tail fits as well
        (192 + 20, 0.193, 160),  # it does not: what is left grows to 52
        (32 + 20, 0.033, 52),  # nothing to cut
    ],
)
def test_no_tail_smaller_than_the_minimum_is_left(remaining, budget_s, chunk):
    assert chunk == solve_chunk(_linear(0, 1e-3), remaining=remaining, budget_s=budget_s)


@given(
    remaining=st.integers(1, 10**6),
    context=st.integers(0, 10**7),
    budget_ms=st.floats(1, 1000),
    step_us=st.floats(0, 10_000),
)
def test_the_search_finds_what_trying_every_size_finds(remaining, context, budget_ms, step_us):
    def predict(num_tokens: int) -> float:
        pairs = num_tokens * context + num_tokens**2 / 2
        # a kernel that works in blocks of 128 rows makes stairs
        return step_us / 1e6 + 1e-5 * num_tokens + 1e-9 * pairs + 1e-4 * -(-num_tokens // 128)

    chunk = solve_chunk(predict, remaining=remaining, budget_s=budget_ms / 1e3)

    sizes = range(32, min(remaining, 8192) + 1, 32)
    fitting = [size for size in sizes if predict(size) <= budget_ms / 1e3]
    largest = max([*fitting, min(32, remaining)])
    if predict(min(32, remaining)) > budget_ms / 1e3:
        assert chunk == 0
    elif remaining - largest >= 32:
        assert chunk == largest
    else:
        assert chunk in (remaining, (remaining - 32) // 32 * 32)


def test_the_search_asks_the_predictor_a_few_times_only():
    calls = []

    def predict(num_tokens: int) -> float:
        calls.append(num_tokens)
        return 0.004 + 1e-5 * num_tokens + 1e-10 * (num_tokens * 10**6 + num_tokens**2 / 2)

    solve_chunk(predict, remaining=10**6, budget_s=0.03)

    assert len(calls) <= 4


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


def _passed_s(predict, total: int, depth: int, count: int) -> float:
    """Time through all stages, each of which takes the same share of a step."""
    sizes = [total // count + (index < total % count) for index in range(count)]
    starts = np.cumsum([0, *sizes[:-1]])
    times_s = [predict(int(start), size) / depth for start, size in zip(starts, sizes, strict=True)]
    return sum(times_s) + (depth - 1) * max(times_s)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("total", [40, 1000, 30_000, 10**6])
@pytest.mark.parametrize(("fixed_s", "pair_s"), [(1e-3, 0.0), (1e-2, 1e-9), (0.1, 1e-8)])
def test_the_number_of_chunks_weighs_the_fill_against_the_cost_of_a_step(
    depth, total, fixed_s, pair_s
):
    def predict(start: int, size: int) -> float:
        return fixed_s + 1e-5 * size + pair_s * (size * start + size**2 / 2)

    count = solve_lone_count(predict, total, depth)

    fewest, most = -(-total // 8192), max(1, total // 32)
    counts = {min(most, max(fewest, round(1.3**step))) for step in range(40)}
    best_s = min(_passed_s(predict, total, depth, each) for each in counts)
    assert fewest <= count <= max(most, fewest)
    # where context makes later chunks dearer, chunks of equal times beat those of equal sizes
    assert _passed_s(predict, total, depth, count) <= (1.05 if pair_s == 0 else 1.12) * best_s


@pytest.mark.parametrize("depth", [1, 2, 16])
@pytest.mark.parametrize("total", [1000, 40_000, 10**6])
def test_no_chunk_takes_longer_than_a_newcomer_may_wait(depth, total):
    def predict(start: int, size: int) -> float:
        return 5e-3 + 1e-4 * size + 1e-8 * (size * start + size**2 / 2)

    count, free = (solve_lone_count(predict, total, depth, max_s=s) for s in (0.5, float("inf")))

    size = -(-total // count)
    assert predict((total - size) // 2, size) <= 0.5
    if predict((total - total // free) // 2, -(-total // free)) <= 0.5:
        assert count == free


def test_the_smallest_chunk_is_taken_where_even_that_takes_too_long():
    assert solve_lone_count(lambda start, size: 1.0 * size, 320, 2, max_s=0.5) == 10


def test_where_steps_look_free_chunks_are_not_made_ever_smaller():
    count = solve_lone_count(lambda start, size: 1e-5 * size, 500_000, 4)

    assert count == 96
