"""How many pages a memory budget holds, and what that is in requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.pages import free_memory
from mnemosyne.cache.room import Room
from mnemosyne.config import CacheConfig, ScheduleConfig


def count_pages(
    config: CacheConfig,
    *,
    token_bytes: int,
    weight_bytes: int,
    device: torch.device,
    num_sharing: int = 1,
    num_tracks: int = 1,
    num_passing: int = 0,
) -> int:
    """Pages that the memory budget of one rank holds, beside weights that are not loaded yet.

    Args:
        config: the budget.
        token_bytes: bytes of K and V per token in a page on this rank.
        weight_bytes: bytes of the weights that this rank will load.
        device: where both go.
        num_sharing: ranks that share the memory of the device and want as much each.
        num_tracks: pages that hold the same tokens in all layers.
        num_passing: pages that no request holds.

    Raises:
        ValueError: if it is less than one page, or more than what the weights leave.
    """
    free_bytes = max(0, free_memory(device) // num_sharing - weight_bytes)
    if config.num_tokens is not None:
        num_tokens, asked = config.num_tokens, f"cache.max_tokens={config.num_tokens}"
        num_pages = num_tracks * pages_for(num_tokens, config.page_size) if num_tokens else 0
    else:
        budget = int(free_bytes * config.memory_share)
        asked = f"cache.memory_share={config.memory_share}"
        num_pages = budget // token_bytes // config.page_size - num_passing
        num_tokens = max(0, budget // token_bytes - num_passing * config.page_size) // num_tracks
    if num_pages < num_tracks:
        raise ValueError(
            f"{asked} must hold at least one page of {config.page_size} tokens "
            f"({num_tracks * config.page_size * token_bytes:,} bytes), got room for {num_tokens} "
            "tokens; raise it or lower cache.page_size"
        )
    pool_bytes = (num_pages + num_passing) * config.page_size * token_bytes
    if pool_bytes > free_bytes:
        raise ValueError(
            f"{asked} must fit the memory of {device} that the weights leave, "
            f"{free_bytes / 2**30:.1f} GiB, got {pool_bytes / 2**30:.1f} GiB; lower it"
        )
    return num_pages


def kinds_of(windows: Sequence[int | None], config: CacheConfig) -> PageKinds:
    """The kinds of layers that a cache tells apart.

    Args:
        windows: of all layers of the model.
        config: of the cache; where prefixes go to the disk, every layer keeps every key.
    """
    if config.dir is not None:
        return PageKinds(config.page_size)
    return PageKinds.of(windows, config.page_size)


def most_rows(config: ScheduleConfig) -> int:
    """Rows of a step in chunks at most; a short end of a prompt joins the chunk before it."""
    return config.fixed_chunk or config.max_chunk + config.min_chunk


def tokens_per_group(config: CacheConfig, num_pages: int, kinds: PageKinds) -> int:
    """Tokens of one request that a group holds at most.

    Args:
        config: the limit, if there is one.
        num_pages: of a group.
        kinds: of layers; where none keeps every key, a group holds requests of any length.

    Raises:
        ValueError: if the limit is not a multiple of the page, or a group cannot hold it.
    """
    capacity = kinds.most_tokens(num_pages)
    limit = config.num_tokens_per_group
    if limit is None:
        return capacity
    if limit < 1 or limit % config.page_size:
        raise ValueError(
            f"cache.max_tokens_per_group must be a multiple of cache.page_size="
            f"{config.page_size}, got {limit}; "
            f"use {max(1, round(limit / config.page_size)) * config.page_size}"
        )
    return min(limit, capacity) if kinds.keeps else capacity


def describe_cache(
    num_pages: int,
    kinds: PageKinds,
    *,
    token_bytes: int,
    num_groups: int,
    max_tokens_per_group: int,
) -> str:
    """One line: tokens that fit, their memory, and how many requests of which length that is.

    Args:
        num_pages: of each group.
        kinds: of layers.
        token_bytes: of the keys and values of a token in a page on one rank.
        num_groups: KV-cache groups, over which a request is spread when one may hold no more of it.
        max_tokens_per_group: of one request.
    """
    num_tokens = num_groups * kinds.capacity(num_pages)
    gib = num_pages * kinds.page_size * token_bytes / 2**30
    lengths = [(2**20, "1M"), (2**17, "128K"), (2**13, "8K"), (2**10, "1K")]
    room = Room([num_pages] * num_groups, kinds, max_tokens_per_group)
    counts = [(room.most_requests(n), name) for n, name in lengths]
    parts = [f"{count:,} of {name}" for count, name in counts if count]
    longest = room.max_request_tokens()
    requests = " or ".join(parts) if parts else f"one of {longest}"
    place = f"{gib:.2f} GiB" if num_groups == 1 else f"{num_groups} groups, {gib:.2f} GiB a rank"
    return f"KV cache: {num_tokens:,} tokens in {place}; requests that fit: {requests}"
