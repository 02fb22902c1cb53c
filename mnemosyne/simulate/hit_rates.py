"""Hit rates of a prefix cache: ours, beside plain LRU by page and the offline optimum."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush

from mnemosyne.request import RequestOutput
from mnemosyne.simulate.workload import HASHED_TOKENS, Arrival

NEVER = 2**62  # the time of a use that does not come
Pages = list[list[int]]  # of each request: ids of the prefixes up to the end of each of its pages


@dataclass(frozen=True, slots=True)
class HitRates:
    """Shares of prompt tokens that need not be computed."""

    ours: float  # with requests that overlap, and hold pages while they run
    plain_lru: float  # one after the other; pages go by their last use alone
    optimum: float  # one after the other, with the future known

    def as_json(self) -> dict[str, float]:
        """Plain values by name."""
        return asdict(self)


def hit_rates(
    arrivals: Sequence[Arrival],
    outputs: Sequence[RequestOutput],
    *,
    num_pages: int,
    page_size: int,
) -> HitRates:
    """Hit rates of a workload that is over.

    Args:
        arrivals: the requests.
        outputs: what each got, in the same order; those that were refused do not count.
        num_pages: of the cache.
        page_size: tokens per page.
    """
    pairs = zip(arrivals, outputs, strict=True)
    done = [(arrival, output) for arrival, output in pairs if output.error is None]
    num_tokens = sum(arrival.prompt_tokens for arrival, _ in done) or 1
    pages = pages_of((arrival for arrival, _ in done), page_size)
    most = [(arrival.prompt_tokens - 1) // page_size for arrival, _ in done]
    return HitRates(
        sum(output.metrics.num_cached for _, output in done) / num_tokens,
        plain_lru_hits(pages, most, num_pages) * page_size / num_tokens,
        optimal_hits(pages, most, num_pages) * page_size / num_tokens,
    )


def pages_of(arrivals: Iterable[Arrival], page_size: int) -> Pages:
    """The pages of each request: one has an id of its own by all tokens up to its end.

    Those that hold output are nobody else's.
    """
    known: dict[tuple[int, tuple[int, ...]], int] = {}
    found = []
    for number, arrival in enumerate(arrivals):
        last, pages, num_prompt = -1, list[int](), arrival.prompt_tokens
        for stop in range(page_size, num_prompt + arrival.output_tokens + page_size, page_size):
            first, end = (stop - page_size) // HASHED_TOKENS, -(-stop // HASHED_TOKENS)
            hashes = arrival.hash_ids[first:end] if stop <= num_prompt else (-1 - number,)
            last = known.setdefault((last, hashes), len(known))
            pages.append(last)
        found.append(pages)
    return found


def plain_lru_hits(pages: Pages, most: Sequence[int], num_pages: int) -> int:
    """Pages that are hit if the one that was used longest ago goes, whatever follows it.

    Args:
        pages: of each request, in order.
        most: of each, pages that may be hit: one token is left to compute.
        num_pages: of the cache.
    """
    cache: OrderedDict[int, None] = OrderedDict()
    num_hits = 0
    for own, limit in zip(pages, most, strict=True):
        num_hits += _prefix(own[:limit], cache.__contains__)
        for page in own:
            cache[page] = None
            cache.move_to_end(page)
            if len(cache) > num_pages:
                cache.popitem(last=False)
    return num_hits


def optimal_hits(pages: Pages, most: Sequence[int], num_pages: int) -> int:
    """The same if the page goes that is used again last; pages may be left out at once.

    Of pages that are used again together, the last of a chain goes, so that prefixes stay whole.

    Source: Belady 1966, A study of replacement algorithms for a virtual-storage computer.
    """
    next_use: list[list[int]] = []
    seen: dict[int, int] = {}
    for time in range(len(pages) - 1, -1, -1):
        next_use.append([seen.get(page, NEVER) for page in pages[time]])
        seen.update(dict.fromkeys(pages[time], time))
    next_use.reverse()
    uses: dict[int, int] = {}  # of pages in the cache: when each is used next
    order: list[tuple[int, int, int]] = []  # (-next use, -depth, page), some out of date
    num_hits = 0
    for own, limit, nexts in zip(pages, most, next_use, strict=True):
        num_hits += _prefix(own[:limit], uses.__contains__)
        for depth, (page, use) in enumerate(zip(own, nexts, strict=True)):
            uses[page] = use
            heappush(order, (-use, -depth, page))
        while len(uses) > num_pages:
            negative, _, page = heappop(order)
            if uses.get(page) == -negative:
                del uses[page]
        if len(order) > 4 * len(uses) + 1024:
            order = [each for each in set(order) if uses.get(each[2]) == -each[0]]
            heapify(order)
    return num_hits


def _prefix(pages: Sequence[int], is_there: Callable[[int], bool]) -> int:
    """Pages that are there before the first that is not."""
    for index, page in enumerate(pages):
        if not is_there(page):
            return index
    return len(pages)
