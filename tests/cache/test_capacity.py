"""How much cache a budget buys, and how that is said."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.cache.capacity import count_pages, describe_cache, tokens_per_group
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.ledger import Ledger
from mnemosyne.config import CacheConfig, parse_size
from mnemosyne.schedule.routing import Router

CPU = torch.device("cpu")
TOKEN_BYTES = 1000


@pytest.fixture(autouse=True)
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> int:
    """Leave the machine a hundred million."""
    monkeypatch.setattr("mnemosyne.cache.capacity.free_memory", lambda device: 10**8)
    return 10**8


def pages(weight_bytes: int = 0, **fields: object) -> int:
    config = CacheConfig(**{"page_size": 100, **fields})
    return count_pages(config, token_bytes=TOKEN_BYTES, weight_bytes=weight_bytes, device=CPU)


def describe(num_pages: int, page_size: int, **sizes: int) -> str:
    one_group = {"num_groups": 1, "max_tokens_per_group": num_pages * page_size}
    return describe_cache(num_pages, PageKinds(page_size), **{"token_bytes": 1} | one_group | sizes)


def per_group(**fields: object) -> int:
    config = CacheConfig(**{"page_size": 16, **fields})
    return tokens_per_group(config, 10, PageKinds(16))


def requests(said: str) -> str:
    return said.rpartition(": ")[2]


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, 1), (100, 1), (101, 2), ("64K", 656)])
def test_a_number_of_tokens_is_rounded_up_to_pages(max_tokens: int | str, expected: int) -> None:
    assert pages(max_tokens=max_tokens) == expected


def test_a_share_is_of_what_the_weights_leave() -> None:
    assert pages(memory_share=0.5) == 500
    assert pages(memory_share=0.5, weight_bytes=6 * 10**7) == 200


def test_the_budget_may_be_all_that_the_weights_leave_but_no_more() -> None:
    assert pages(max_tokens=40_000, weight_bytes=6 * 10**7) == 400

    with pytest.raises(
        ValueError, match=r"max_tokens=40001 must fit the memory of cpu that the we"
    ):
        pages(max_tokens=40_001, weight_bytes=6 * 10**7)


@pytest.mark.parametrize(
    ("fields", "weight_bytes"),
    [({"max_tokens": 0}, 0), ({"memory_share": 1e-6}, 0), ({"memory_share": 0.9}, 10**9)],
)
def test_less_than_a_page_is_refused(fields: dict[str, object], weight_bytes: int) -> None:
    said = r"must hold at least one page of 100 tokens \(100,000 bytes\), got room for 0 tokens; ra"
    with pytest.raises(ValueError, match=said):
        pages(weight_bytes, **fields)


def test_the_cache_is_described_in_tokens_bytes_and_requests() -> None:
    said = describe(20 * 2**9, 2**7, token_bytes=2**10)

    assert said == (
        "KV cache: 1,310,720 tokens in 1.25 GiB; "
        "requests that fit: 1 of 1M or 10 of 128K or 160 of 8K or 1,280 of 1K"
    )


def test_a_request_takes_whole_pages() -> None:
    assert requests(describe(20, 2**16)) == "1 of 1M or 10 of 128K or 20 of 8K or 20 of 1K"


@pytest.mark.parametrize(
    ("num_groups", "max_tokens_per_group", "expected"),
    [
        (1, 2**10, "128 of 1K"),
        (1, 2**9, "one of 512"),
        (1, 2**13, "16 of 8K or 128 of 1K"),
        (4, 2**10, "512 of 1K"),  # 8K would take eight groups
        (8, 2**10, "128 of 8K or 1,024 of 1K"),
        (8, 2**14, "8 of 128K or 128 of 8K or 1,024 of 1K"),
        (8, 2**17, "1 of 1M or 8 of 128K or 128 of 8K or 1,024 of 1K"),
        (3, 100 * 2**10, "1 of 128K or 48 of 8K or 384 of 1K"),
    ],
)
def test_no_request_is_said_to_fit_that_would_be_refused(
    num_groups: int, max_tokens_per_group: int, expected: str
) -> None:
    said = describe(2**10, 2**7, num_groups=num_groups, max_tokens_per_group=max_tokens_per_group)

    assert requests(said) == expected


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
@pytest.mark.parametrize("max_tokens_per_group", [64, 128, 512, 640])
def test_as_many_requests_as_are_said_to_fit_are_placed_at_once(
    num_groups: int, max_tokens_per_group: int
) -> None:
    ledger = Ledger([80] * num_groups, page_size=64, max_tokens_per_group=max_tokens_per_group)
    router = Router(ledger)
    said = describe(80, 64, num_groups=num_groups, max_tokens_per_group=max_tokens_per_group)
    if requests(said).startswith("one of "):
        assert ledger.max_request_tokens() == int(requests(said).split()[-1])
        return

    for part in requests(said).split(" or "):
        count, _, name = part.partition(" of ")
        ledger.reset()
        length = parse_size(name)
        for request_id in range(int(count)):
            groups = router.choose(length)
            assert groups is not None
            router.start(ledger.reserve(request_id, groups, length), length)
        router.clear()


def test_a_small_cache_is_described_by_the_one_request_that_it_holds() -> None:
    said = describe(3, 16, token_bytes=2**20)

    assert said == "KV cache: 48 tokens in 0.05 GiB; requests that fit: one of 48"


def test_a_group_holds_all_of_a_request_unless_told_otherwise() -> None:
    assert per_group() == 160
    assert per_group(max_tokens_per_group=64) == 64
    assert per_group(max_tokens_per_group=1600) == 160

    with pytest.raises(ValueError, match=r"multiple of cache.page_size=16, got 50; use 48"):
        per_group(max_tokens_per_group=50)
