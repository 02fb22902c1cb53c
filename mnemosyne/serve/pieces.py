"""Prompts that come in pieces: they are gathered while what has come is prefilled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import numpy as np

from mnemosyne.request import SamplingParams

Ids = int | Sequence[int] | np.ndarray
Pieces = Iterator[Ids] | AsyncIterator[Ids]

SHARE = 32  # of what is prefilled, that must have come on top of it before prefill goes on
FIRST_TOKENS = 4096  # that there is room for at the beginning


class Gathered:
    """The ids of a prompt so far.

    Args:
        limit: on how many.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._ids = np.empty(min(limit, FIRST_TOKENS), dtype=np.int64)
        self._num_ids = 0

    def __len__(self) -> int:
        return self._num_ids

    def append(self, ids: np.ndarray) -> None:
        """Add ids.

        Raises:
            ValueError: if they are too many.
        """
        end = self._num_ids + len(ids)
        if end > self._limit:
            raise ValueError(
                f"prompt must hold at most {self._limit} tokens, got {end} or more; shorten it or "
                "ask for fewer"
            )
        if end > len(self._ids):  # what was given away stays as it is
            larger = np.empty(min(self._limit, max(end, 2 * len(self._ids))), dtype=np.int64)
            larger[: self._num_ids] = self._ids[: self._num_ids]
            self._ids = larger
        self._ids[self._num_ids : end] = ids
        self._num_ids = end

    def so_far(self) -> np.ndarray:
        """All of them, int64; nobody changes them."""
        return self._ids[: self._num_ids]


async def gather(
    pieces: AsyncIterator[np.ndarray],
    prefill: Callable[[np.ndarray], Awaitable[None]],
    *,
    limit: int,
    page_size: int | None,
) -> np.ndarray:
    """Take pieces to their end, and meanwhile have prefilled what has come.

    Prefill goes on once a page is new, and a share of what is done: so the beginning, which is
    looked up again each time, is looked up a few times and not for every piece.

    Args:
        pieces: checked ids, int64.
        prefill: has the cache know the keys and values of ids. It is cancelled at the end of the
            pieces; what it has done by then counts.
        limit: on all ids.
        page_size: tokens that the cache knows prefixes by; None: it knows none, and nothing is
            prefilled.

    Returns:
        All ids, int64.

    Raises:
        ValueError: if there are none or too many, or what has come is refused already.
    """
    ids, grown = Gathered(limit), asyncio.Event()

    async def take() -> None:
        async for piece in pieces:
            ids.append(piece)
            grown.set()

    async def compute(page_size: int) -> None:
        num_done = 0
        while True:
            await grown.wait()
            grown.clear()
            while len(ids) - num_done >= max(page_size, num_done // SHARE):
                num_done = len(ids)
                await prefill(ids.so_far())

    tasks = [asyncio.ensure_future(take())]
    if page_size is not None:
        tasks.append(asyncio.ensure_future(compute(page_size)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if not len(ids):
        raise ValueError("prompt must hold at least one token, got none; write something")
    return ids.so_far()


def prefill_only(params: SamplingParams) -> SamplingParams | None:
    """Parameters that compute a prompt as others will find it in the cache.

    None where they would not: log-probabilities of a prompt want all of it computed at once.
    """
    if params.prompt_logprobs is not None:
        return None
    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        ignore_eos=True,
        priority=params.priority,
        deadline=params.deadline,
        cache_salt=params.cache_salt,
    )
