"""The tokens of a prompt that a step takes: the chunk rule, usable on its own.

>>> solve_chunk(lambda tokens: 0.01 + 0.001 * tokens, remaining=5000, budget_s=0.2)
160
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

CHUNK_MULTIPLE = 32  # sizes fill matrix tiles
MAX_LINES = 6  # tries before a search halves what is left
LONE_RATE = 0.98  # share of the best prefill rate at which a larger chunk gains nothing
LONE_FLOW = 0.99  # the same of a prompt that flows through several stages
MAX_PER_STAGE = 24  # chunks of a prompt: with this many the fill is 4% of its time
SPACING = 1.1  # of neighbouring numbers of chunks that are tried


def solve_chunk(
    predict: Callable[[int], float],
    *,
    remaining: int,
    budget_s: float,
    min_chunk: int = 32,
    max_chunk: int = 8192,
    without_s: float = 0.0,
) -> int:
    """The largest chunk whose predicted step time stays within the budget.

    Args:
        predict: seconds of the whole step if the chunk has that many tokens; must not fall.
        remaining: prompt tokens not yet computed, at least 1.
        budget_s: seconds the step may take.
        min_chunk: smallest chunk worth a place in a batch, tokens.
        max_chunk: largest chunk, tokens.
        without_s: seconds of the step without the chunk; spares predictions.

    Returns:
        ``remaining`` where all of it fits, else a multiple of 32 in ``[min_chunk, max_chunk]``,
        or 0 if not even ``min_chunk`` fits. A piece smaller than ``min_chunk`` is never left over:
        it joins the chunk before if the budget allows, else that chunk is cut shorter. Only a
        chunk too small to be cut takes such a piece along beyond the budget.

    Source: Medha, arXiv 2409.17264, adaptive chunking; the tail rule is ours.
    """
    if without_s > budget_s:
        return 0
    smallest, largest = min(min_chunk, remaining), min(max_chunk, remaining)
    largest_s = predict(largest)
    if largest_s > budget_s:
        size = _largest_fitting(predict, budget_s, smallest, largest, largest_s, without_s)
    elif largest == remaining:
        return remaining
    else:
        size = max(largest // CHUNK_MULTIPLE * CHUNK_MULTIPLE, smallest)
    if size == 0 or remaining - size >= min_chunk:
        return size
    shorter = max((remaining - min_chunk) // CHUNK_MULTIPLE * CHUNK_MULTIPLE, min_chunk)
    if remaining - shorter < min_chunk or predict(remaining) <= budget_s:
        return remaining
    return shorter


def _largest_fitting(
    predict: Callable[[int], float],
    budget_s: float,
    smallest: int,
    largest: int,
    largest_s: float,
    without_s: float,
) -> int:
    """The largest multiple between two sizes, or else the smaller one, that fits; 0 if none does.

    Step time is nearly linear in the chunk: the line through the last two sizes that were tried
    meets the budget at the answer or beside it. Where it does not, halving ends the search.

    Args:
        largest: tokens that do not fit.
        largest_s: seconds of a step with that many.
    """
    low, high = (smallest - 1) // CHUNK_MULTIPLE, -(-largest // CHUNK_MULTIPLE)
    before, before_s, last, last_s = 0, without_s, largest, largest_s
    num_tried = 0
    while high - low > 1:
        middle = (low + high) // 2
        if num_tried < MAX_LINES and last_s != before_s:
            line = last + (budget_s - last_s) / (last_s - before_s) * (last - before)
            middle = min(max(int(line) // CHUNK_MULTIPLE, low + 1), high - 1)
        size = middle * CHUNK_MULTIPLE
        before, before_s, last, last_s = last, last_s, size, predict(size)
        if last_s <= budget_s:
            low = middle
        else:
            high = middle
        num_tried += 1
    if low * CHUNK_MULTIPLE >= smallest:
        return low * CHUNK_MULTIPLE
    is_tried = smallest % CHUNK_MULTIPLE == 0 or smallest == largest
    return 0 if is_tried or predict(smallest) > budget_s else smallest


def solve_lone_chunk(
    predict: Callable[[int], float],
    *,
    remaining: int,
    min_chunk: int = 32,
    max_chunk: int = 8192,
) -> int:
    """The chunk for a prefill that delays no other: the smallest one at nearly the best rate.

    Larger chunks only save the fixed cost of a step; beyond 98% of the best rate they would make
    a new arrival wait for nothing.

    Args:
        predict: seconds of the step if the chunk has that many tokens.
        remaining: prompt tokens not yet computed, at least 1.
        min_chunk: smallest chunk, tokens.
        max_chunk: largest chunk, tokens.

    Returns:
        Tokens, by the same rules as ``solve_chunk``.
    """
    sizes = []
    size = min(min_chunk, max_chunk, remaining)
    while size < min(max_chunk, remaining):
        sizes.append(size)
        size *= 2
    sizes.append(min(max_chunk, remaining))
    # a predictor that knows nothing yet says 0: then the largest chunk has the best rate
    rates = [size / max(predict(size), 1e-12) for size in sizes]
    chosen = next(
        size for size, rate in zip(sizes, rates, strict=True) if rate >= LONE_RATE * max(rates)
    )
    return close_tail(chosen, remaining, min_chunk)


def solve_lone_count(
    predict: Callable[[int, int], float],
    total: int,
    depth: int,
    *,
    min_chunk: int = 32,
    max_chunk: int = 8192,
    max_s: float = inf,
) -> int:
    """The number of chunks in which a prompt alone passes soonest through several stages.

    Chunks that take equally long flow without a gap, and ``count`` of them through ``depth``
    stages take ``count + depth - 1`` times as long as one on one stage: few chunks make the fill
    long, many pay the fixed cost of a step often. Where each takes as long, that is as long as the
    one in the middle of the prompt if all had the same size.

    Args:
        predict: seconds of a step that computes so many tokens (second) from a position (first),
            through all stages; must not fall when either grows.
        total: tokens of the prompt, at least 1.
        depth: stages.
        min_chunk: smallest chunk, tokens.
        max_chunk: largest chunk, tokens.
        max_s: seconds that a step may take, as far as the smallest chunk allows.

    Returns:
        The largest number of chunks at nearly the least time: smaller ones let new arrivals in
        sooner. At most ``MAX_PER_STAGE`` by stage, however cheap a step looks, unless larger ones
        take more than ``max_s``.

    Source: a flow shop in which a job takes as long on each machine; the choice is ours.
    """

    def step_s(count: int) -> float:
        size = -(-total // count)
        return predict((total - size) // 2, size)

    fewest, smallest = -(-total // max_chunk), total // min_chunk
    while fewest < smallest and step_s(fewest) > max_s:
        fewest = min(smallest, max(fewest + 1, int(fewest * SPACING)))
    most = max(fewest, min(smallest, MAX_PER_STAGE * depth))
    counts = [fewest]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, int(counts[-1] * SPACING))))
    times_s = [(count + depth - 1) * step_s(count) for count in counts]
    enough_s = min(times_s) / LONE_FLOW
    return max(c for c, seconds in zip(counts, times_s, strict=True) if seconds <= enough_s)


def close_tail(chunk: int, remaining: int, min_chunk: int) -> int:
    """``chunk``, or all that remains where less than ``min_chunk`` would be left after it."""
    return remaining if remaining - chunk < min_chunk else chunk
