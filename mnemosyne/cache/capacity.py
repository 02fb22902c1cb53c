"""How many pages a memory budget holds, and what that is in requests."""

from __future__ import annotations

import torch

from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.pages import free_memory
from mnemosyne.config import CacheConfig


def count_pages(
    config: CacheConfig,
    *,
    token_bytes: int,
    weight_bytes: int,
    device: torch.device,
    num_sharing: int = 1,
) -> int:
    """Pages that the memory budget of one rank holds, beside weights that are not loaded yet.

    Args:
        config: the budget.
        token_bytes: bytes of K and V per token on this rank.
        weight_bytes: bytes of the weights that this rank will load.
        device: where both go.
        num_sharing: ranks that share the memory of the device and want as much each.

    Raises:
        ValueError: if it is less than one page, or more than what the weights leave.
    """
    free_bytes = max(0, free_memory(device) // num_sharing - weight_bytes)
    if config.num_tokens is not None:
        num_tokens, asked = config.num_tokens, f"cache.max_tokens={config.num_tokens}"
        num_pages = pages_for(num_tokens, config.page_size) if num_tokens else 0
    else:
        budget = int(free_bytes * config.memory_share)
        num_tokens, asked = budget // token_bytes, f"cache.memory_share={config.memory_share}"
        num_pages = num_tokens // config.page_size
    if num_pages < 1:
        raise ValueError(
            f"{asked} must hold at least one page of {config.page_size} tokens "
            f"({config.page_size * token_bytes:,} bytes), got room for {num_tokens} tokens; "
            "raise it or lower cache.page_size"
        )
    pool_bytes = num_pages * config.page_size * token_bytes
    if pool_bytes > free_bytes:
        raise ValueError(
            f"{asked} must fit the memory of {device} that the weights leave, "
            f"{free_bytes / 2**30:.1f} GiB, got {pool_bytes / 2**30:.1f} GiB; lower it"
        )
    return num_pages


def tokens_per_group(config: CacheConfig, num_pages: int) -> int:
    """Tokens of one request that a group holds at most.

    Raises:
        ValueError: if the limit is not a multiple of the page, or a group cannot hold it.
    """
    capacity = num_pages * config.page_size
    limit = config.num_tokens_per_group
    if limit is None:
        return capacity
    if limit < 1 or limit % config.page_size:
        raise ValueError(
            f"cache.max_tokens_per_group must be a multiple of cache.page_size="
            f"{config.page_size}, got {limit}; "
            f"use {max(1, round(limit / config.page_size)) * config.page_size}"
        )
    return min(limit, capacity)


def describe_cache(
    num_pages: int,
    page_size: int,
    *,
    token_bytes: int,
    num_groups: int,
    max_tokens_per_group: int,
) -> str:
    """One line: tokens that fit, their memory, and how many requests of which length that is.

    Args:
        num_pages: of each group.
        page_size: tokens per page.
        token_bytes: of a token's keys and values on one rank.
        num_groups: KV-cache groups, over which a request is spread when one may hold no more of it.
        max_tokens_per_group: of one request.
    """
    num_tokens = num_groups * num_pages * page_size
    gib = num_pages * page_size * token_bytes / 2**30
    lengths = [(2**20, "1M"), (2**17, "128K"), (2**13, "8K"), (2**10, "1K")]
    room = {"num_groups": num_groups, "max_tokens_per_group": max_tokens_per_group}
    counts = [(_count_requests(n, num_pages, page_size, **room), name) for n, name in lengths]
    parts = [f"{count:,} of {name}" for count, name in counts if count]
    longest = num_groups * min(num_pages * page_size, max_tokens_per_group)
    requests = " or ".join(parts) if parts else f"one of {longest}"
    place = f"{gib:.2f} GiB" if num_groups == 1 else f"{num_groups} groups, {gib:.2f} GiB a rank"
    return f"KV cache: {num_tokens:,} tokens in {place}; requests that fit: {requests}"


def _count_requests(
    num_tokens: int, num_pages: int, page_size: int, *, num_groups: int, max_tokens_per_group: int
) -> int:
    """Requests of one length that empty groups surely hold, no two shards of one on one group."""
    num_shards = -(-num_tokens // max_tokens_per_group)
    if num_shards > num_groups:
        return 0
    shard_pages = pages_for(min(num_tokens, max_tokens_per_group), page_size)
    return num_groups * (num_pages // shard_pages) // num_shards
