"""Short and long requests together: what the scheduler does to their times. The setting is Medha's.

Source: Medha, arXiv 2409.17264v5, section 6: Llama-3 8B on 16 A100, 5% of 128K to 1M tokens, 0.75
requests per second.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mnemosyne.cli.shapes import find_shape
from mnemosyne.joining.simulated import build_simulation
from mnemosyne.simulate.workload import draw
from tests.simulate.machines import simulate_config

PLATFORM = ("hardware=a100_80", "mesh.pp=2", "mesh.tp=8", "schedule.max_sequences=256")
LONG = 128 * 1024
STATIC = ("schedule.policy=fcfs", "schedule.chunk=2K")


def _serve(rate: float, count: int, *words: str) -> tuple[np.ndarray, np.ndarray, float]:
    """TTFT of all requests in seconds, which of them are long, and the share that is on time."""
    load = (f"workload.rate={rate}", f"workload.num_requests={count}")
    config = simulate_config(*PLATFORM, *load, *words, model="llama3_8b")
    shape = find_shape("llama3_8b")
    alone = build_simulation(simulate_config(*PLATFORM, model="llama3_8b"), shape)
    alone_s = alone.engine.scheduler.prefill_s
    arrivals = [
        replace(arrival, deadline_s=max(1.0, 2 * alone_s(arrival.prompt_tokens)))
        for arrival in draw(config.workload)
    ]
    outputs = build_simulation(config, shape).run(arrivals)
    ttft = np.array([output.metrics.ttft_s for output in outputs])
    deadlines = np.array([arrival.deadline_s for arrival in arrivals])
    is_long = np.array([arrival.prompt_tokens >= LONG for arrival in arrivals])
    return ttft, is_long, float(np.mean(ttft <= deadlines))


@pytest.mark.slow
def test_lars_lowers_the_times_of_fcfs_with_static_chunks_many_times() -> None:
    ttft, is_long, _ = _serve(0.75, 600)
    static_ttft, _, _ = _serve(0.75, 600, *STATIC)

    assert np.median(static_ttft) >= 16 * np.median(ttft)
    short, static_short = ttft[~is_long], static_ttft[~is_long]
    assert np.percentile(static_short, 99) >= 16 * np.percentile(short, 99)


@pytest.mark.slow
def test_packing_lowers_the_median_time_to_first_token() -> None:
    packed, _, _ = _serve(0.75, 600)
    apart, _, _ = _serve(0.75, 600, "schedule.max_relative_slack=0.0")

    assert np.median(apart) >= 1.5 * np.median(packed)


@pytest.mark.slow
def test_the_capacity_is_more_than_five_times_that_of_fcfs_with_static_chunks() -> None:
    _, _, on_time = _serve(0.6, 200)
    _, _, static_on_time = _serve(0.12, 200, *STATIC)

    assert on_time >= 0.9
    assert static_on_time < 0.9
