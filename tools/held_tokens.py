"""Requests that a cache of layers with windows holds, beside what layers, window and pages give.

Each length is admitted until no more fit, over one group and over four. *held* counts their tokens;
*exact* are whole requests as well, by their bytes: all tokens in layers that see everything, the
pages that a row sees in the others. *full* are the tokens if every layer kept all keys.

Usage: python tools/held_tokens.py [--gib 128]
"""

from __future__ import annotations

import argparse
from itertools import count

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.ledger import Ledger
from mnemosyne.schedule.routing import Router

PAGE_SIZE = 128
LENGTHS = {"32K": 32 << 10, "128K": 128 << 10}
FIVE_OF_SIX = [1024] * 5 + [None]
MODELS: dict[str, tuple[list[int | None], int]] = {  # windows, and bytes of a token in one layer
    "5 of 6 layers at 1,024": (FIVE_OF_SIX * 8, 4096),
    "Gemma 3 27B": (FIVE_OF_SIX * 10 + [1024] * 2, 8192),
    "gpt-oss 20B": ([128, None] * 12, 2048),
    "Mistral v0.1": ([4096] * 32, 4096),
}


def held(ledger: Ledger, length: int) -> int:
    """Requests of one length that an empty cache admits at once."""
    ledger.reset()
    router = Router(ledger)
    for holder in count():
        places = router.choose(length)
        if places is None:
            return holder
        router.start(ledger.reserve(holder, places, length), length)
    raise AssertionError("every cache is full at last")


def exact_bytes(windows: list[int | None], token_bytes: int, length: int) -> int:
    """Bytes of one request: pages that its last row sees, in every layer."""
    pages = (
        pages_for(length, PAGE_SIZE) if window is None else (window - 2) // PAGE_SIZE + 2
        for window in windows
    )
    return sum(pages) * PAGE_SIZE * token_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=128.0, help="memory of the cache")
    memory = int(parser.parse_args().gib * 2**30)
    print(f"{'model':24} {'length':>6} {'groups':>6} {'held':>12} {'of exact':>8} {'of full':>8}")
    for model, (windows, token_bytes) in MODELS.items():
        kinds = PageKinds.of(windows, PAGE_SIZE)
        page_bytes = PAGE_SIZE * token_bytes * kinds.layers_per_page(windows)
        for name, length in LENGTHS.items():
            for num_groups in (1, 4):
                ledger = Ledger(
                    [memory // num_groups // page_bytes] * num_groups,
                    page_size=PAGE_SIZE,
                    max_tokens_per_group=length // num_groups if kinds.keeps else 2**40,
                    kinds=kinds,
                )
                tokens = held(ledger, length) * length
                exact = memory // exact_bytes(windows, token_bytes, length) * length
                full = memory / (len(windows) * token_bytes)
                shares = f"{tokens / exact:8.1%} {tokens / full:8.1f}"
                print(f"{model:24} {name:>6} {num_groups:6} {tokens:12,} {shares}")


if __name__ == "__main__":
    main()
