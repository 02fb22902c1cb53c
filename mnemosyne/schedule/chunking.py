"""How many tokens of a prompt a step takes: the chunk rule, usable on its own.

>>> solve_chunk(lambda tokens: 0.01 + 0.001 * tokens, remaining=5000, budget_s=0.2)
160
"""

from __future__ import annotations

from collections.abc import Callable

CHUNK_MULTIPLE = 32  # sizes fill matrix tiles
LONE_RATE = 0.98  # share of the best prefill rate at which a larger chunk gains nothing


def solve_chunk(
    predict: Callable[[int], float],
    *,
    remaining: int,
    budget_s: float,
    min_chunk: int = 32,
    max_chunk: int = 8192,
) -> int:
    """The largest chunk whose predicted step time stays within the budget.

    Args:
        predict: seconds of the whole step if the chunk has that many tokens; must not fall.
        remaining: prompt tokens not yet computed, at least 1.
        budget_s: seconds the step may take.
        min_chunk: smallest chunk worth a place in a batch, tokens.
        max_chunk: largest chunk, tokens.

    Returns:
        ``remaining`` where all of it fits, else a multiple of 32 in ``[min_chunk, max_chunk]``,
        or 0 if not even ``min_chunk`` fits. A piece smaller than ``min_chunk`` is never left over:
        it joins the chunk before if the budget allows, else that chunk is cut shorter. Only a
        chunk too small to be cut takes such a piece along beyond the budget.

    Source: Medha, arXiv 2409.17264, adaptive chunking; the tail rule is ours.
    """
    if remaining <= max_chunk and predict(remaining) <= budget_s:
        return remaining
    smallest = min(min_chunk, remaining)
    smallest_s = predict(smallest)
    if smallest_s > budget_s:
        return 0
    limit = min(remaining, max_chunk) // CHUNK_MULTIPLE
    fitting = _most_multiples(predict, budget_s, smallest // CHUNK_MULTIPLE, smallest_s, limit)
    size = max(fitting * CHUNK_MULTIPLE, smallest)
    if size == remaining or remaining - size >= min_chunk:
        return size
    shorter = max((remaining - min_chunk) // CHUNK_MULTIPLE * CHUNK_MULTIPLE, min_chunk)
    if remaining - shorter < min_chunk or predict(remaining) <= budget_s:
        return remaining
    return shorter


def _most_multiples(
    predict: Callable[[int], float], budget_s: float, low: int, low_s: float, limit: int
) -> int:
    """The largest count of multiples up to ``limit`` within the budget; ``low`` of them are.

    Step time is nearly linear in the chunk: the line through what is known meets the budget at
    the answer or beside it. Halving bounds the search where it does not.
    """
    if limit <= low or (high_s := predict(limit * CHUNK_MULTIPLE)) <= budget_s:
        return max(limit, low)
    high, turn, fits = limit, 0, True
    while high - low > 1:
        if turn == 0:
            share = (budget_s - low_s) / (high_s - low_s)
            middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        elif turn == 1:
            middle = low + 1 if fits else high - 1
        else:
            middle = (low + high) // 2
        seconds = predict(middle * CHUNK_MULTIPLE)
        fits = seconds <= budget_s
        if fits:
            low, low_s = middle, seconds
        else:
            high, high_s = middle, seconds
        turn = (turn + 1) % 3
    return low


def solve_lone_chunk(
    predict: Callable[[int], float],
    *,
    remaining: int,
    min_chunk: int = 32,
    max_chunk: int = 8192,
) -> int:
    """The chunk for a prefill that delays nobody: the smallest one at nearly the best rate.

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


def close_tail(chunk: int, remaining: int, min_chunk: int) -> int:
    """``chunk``, or all that remains where less than ``min_chunk`` would be left after it."""
    return remaining if remaining - chunk < min_chunk else chunk
