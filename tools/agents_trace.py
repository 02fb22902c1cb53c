"""Write a trace of agents: sessions of many turns, each with all that was said before it.

Sessions of one kind begin with the same system prompt and tools. Every turn adds a few thousand
tokens of results and answers; sometimes a session begins a side task that forks off and ends. Lines
are those of a Mooncake trace, for ``mnemosyne simulate workload.trace=FILE``.

Usage: python tools/agents_trace.py FILE [--sessions 40] [--turns 12] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from mnemosyne.simulate.workload import HASHED_TOKENS

KINDS, SYSTEM_BLOCKS = 3, 24  # of agents, and blocks of 512 tokens of their system prompts
MEAN_GAP_S, MEAN_START_S = 20.0, 15.0  # between turns, and between sessions
MEAN_BLOCKS = 5  # that a turn adds
FORK_SHARE = 0.15  # of turns that begin a side task


def agents_trace(sessions: int, turns: int, seed: int) -> list[dict[str, Any]]:
    """Requests of agents, in order of arrival.

    Args:
        sessions: how many.
        turns: of each, on average.
        seed: of all of them.
    """
    rng = np.random.default_rng(seed)
    fresh = iter(range(KINDS * SYSTEM_BLOCKS, 2**30))
    starts_s = np.cumsum(rng.exponential(MEAN_START_S, sessions))
    lines = [line for start_s in starts_s for line in _session(rng, fresh, float(start_s), turns)]
    return sorted(lines, key=lambda line: line["timestamp"])


def _session(
    rng: np.random.Generator, fresh: Iterator[int], start_s: float, turns: int
) -> Iterator[dict[str, Any]]:
    kind = int(rng.integers(KINDS))
    said = list(range(kind * SYSTEM_BLOCKS, (kind + 1) * SYSTEM_BLOCKS))
    now_s = start_s
    for _ in range(max(1, int(rng.poisson(turns)))):
        said += [next(fresh) for _ in range(1 + int(rng.poisson(MEAN_BLOCKS - 1)))]
        yield _line(rng, fresh, now_s, said)
        if rng.random() < FORK_SHARE:
            aside = [*said[: len(said) // 2], *(next(fresh) for _ in range(MEAN_BLOCKS))]
            yield _line(rng, fresh, now_s + 1.0, aside)
        now_s += float(rng.exponential(MEAN_GAP_S))


def _line(
    rng: np.random.Generator, fresh: Iterator[int], now_s: float, said: list[int]
) -> dict[str, Any]:
    """One turn; its last block is begun and nobody else's."""
    rest = int(rng.integers(1, HASHED_TOKENS))
    return {
        "timestamp": round(1000 * now_s),
        "input_length": len(said) * HASHED_TOKENS + rest,
        "output_length": int(rng.integers(20, 300)),
        "hash_ids": [*said, next(fresh)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--sessions", type=int, default=40)
    parser.add_argument("--turns", type=int, default=12, help="of a session, on average")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    lines = agents_trace(arguments.sessions, arguments.turns, arguments.seed)
    with open(arguments.file, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    num_tokens = sum(line["input_length"] for line in lines)
    print(f"{len(lines)} requests of {num_tokens:,} prompt tokens in {arguments.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
