"""Prefix hashes of traces become hits, counted beside plain LRU and the offline optimum."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from mnemosyne.cli.shapes import find_shape
from mnemosyne.joining.simulated import build_simulation
from mnemosyne.simulate.hit_rates import hit_rates, optimal_hits, pages_of, plain_lru_hits
from mnemosyne.simulate.workload import Arrival, as_row, read_trace, write_trace
from tests.simulate.machines import simulate_config
from tools.agents_trace import agents_trace


def best_hits(pages: list[list[int]], num_pages: int) -> int:
    """Most hits of whole prefixes that any choice of what stays gives."""
    states = {frozenset[int](): 0}
    for own in pages:
        after: dict[frozenset[int], int] = {}
        for cache, hits in states.items():
            found = len(list(itertools.takewhile(cache.__contains__, own)))
            known = cache | set(own)
            for kept in itertools.combinations(sorted(known), min(num_pages, len(known))):
                key = frozenset(kept)
                after[key] = max(after.get(key, 0), hits + found)
        states = after
    return max(states.values())


def test_pages_are_told_apart_by_all_that_is_before_them() -> None:
    arrivals = [
        Arrival(0.0, 1100, 1, hash_ids=(1, 2, 3)),
        Arrival(1.0, 1100, 1, hash_ids=(1, 2, 4)),
        Arrival(2.0, 1100, 1, hash_ids=(5, 2, 3)),
    ]

    one, other, third = pages_of(arrivals, 256)

    assert len(one) == len(other) == len(third) == 5  # the last ones have output
    assert one[:4] == other[:4]
    assert one[4] != other[4]
    assert not set(one) & set(third)


def test_plain_lru_loses_the_beginnings_of_prefixes_first() -> None:
    pages = [[1, 2, 3], [4], [1, 2, 3]]

    assert plain_lru_hits(pages, [3, 1, 3], num_pages=3) == 0
    assert optimal_hits(pages, [3, 1, 3], num_pages=3) == 3
    assert plain_lru_hits(pages, [3, 1, 2], num_pages=4) == 2  # one token is left to compute


def test_no_choice_of_pages_is_better_than_the_optimum() -> None:
    rng = np.random.default_rng(0)
    chains = [[1, 2, 3], [1, 2, 4], [1, 5], [6, 7], [6, 8]]
    for num_pages in (2, 3, 4):
        for _ in range(8):
            pages = [chains[i] for i in rng.integers(0, len(chains), 7)]
            most = [len(own) for own in pages]

            ours = optimal_hits(pages, most, num_pages)

            assert plain_lru_hits(pages, most, num_pages) <= ours
            assert ours == best_hits(pages, num_pages)


def test_a_mooncake_trace_is_read_and_written_as_ours(tmp_path: Path) -> None:
    path, ours = tmp_path / "trace.jsonl", tmp_path / "ours.jsonl"
    line = {"timestamp": 2500, "input_length": 600, "output_length": 7, "hash_ids": [3, 9]}
    path.write_text(json.dumps(line) + "\n")

    (arrival,) = read_trace(path)
    write_trace(ours, [as_row(arrival)])

    assert arrival == Arrival(2.5, 600, 7, hash_ids=(3, 9))
    assert read_trace(ours) == [arrival]
    assert arrival.request(0).prompt_ids.tolist() == [3] * 512 + [9] * 88


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hash_ids": [1]}, "must hold one for each 512 of 600 tokens, got 1"),
        ({"hash_ids": [1, -2]}, "whole numbers in"),
        ({"hash_ids": "1 2"}, "whole numbers in"),
        ({"timestamp": "now"}, "timestamp must be a number"),
        ({"input_length": 0}, "input_length must be a whole number >= 1"),
        ({"prompt_tokens": 600}, "field must be one of timestamp"),
    ],
)
def test_a_line_that_is_no_request_is_refused(
    changed: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "trace.jsonl"
    line = {"timestamp": 0, "input_length": 600, "output_length": 7, "hash_ids": [3, 9]}
    path.write_text(json.dumps(line | changed) + "\n")

    with pytest.raises(ValueError, match=said):
        read_trace(path)


def test_agents_get_more_of_a_cache_than_plain_lru_gives_and_wait_half_as_long(
    tmp_path: Path,
) -> None:
    write_trace(tmp_path / "trace.jsonl", agents_trace(sessions=5, turns=4, seed=0))
    arrivals = read_trace(tmp_path / "trace.jsonl")
    words, ttft_s = ("hardware=h100", "mesh.tp=4", "schedule.chunk=4K"), {}
    for prefix, num_tokens in (("auto", 65_536), ("auto", 98_304), ("off", 98_304)):
        cache = (f"cache.max_tokens={num_tokens}", f"cache.prefix={prefix}")
        config = simulate_config(*words, *cache, model="llama3_8b")
        simulation = build_simulation(config, find_shape("llama3_8b"), shares=True)
        outputs = simulation.run(arrivals)
        rates = hit_rates(arrivals, outputs, num_pages=num_tokens // 128, page_size=128)

        ttft_s[prefix, num_tokens] = np.median([o.metrics.ttft_s for o in outputs])
        if prefix == "auto":
            assert rates.plain_lru <= rates.ours <= rates.optimum

    assert ttft_s["auto", 98_304] <= 0.5 * ttft_s["off", 98_304]
