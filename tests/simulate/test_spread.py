"""Groups that help each other, under load: long prompts gain, and nobody pays for it."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.cli.shapes import find_shape
from mnemosyne.joining.simulated import build_simulation
from mnemosyne.simulate.workload import draw
from tests.simulate.machines import simulate_config

LONG = 16 * 1024
LOAD = (
    *("workload.long_share=0.1", "workload.long_min=16K", "workload.long_max=64K"),
    *("workload.num_requests=60", "mesh.kvp=4"),
)


def _ttft(*words: str) -> tuple[np.ndarray, np.ndarray]:
    """TTFT of short and of long requests in seconds."""
    config = simulate_config(*LOAD, *words, model="llama3_8b")
    arrivals = draw(config.workload)
    outputs = build_simulation(config, find_shape("llama3_8b")).run(arrivals)
    ttft = np.array([output.metrics.ttft_s for output in outputs])
    is_long = np.array([arrival.prompt_tokens >= LONG for arrival in arrivals])
    return ttft[~is_long], ttft[is_long]


@pytest.mark.parametrize("rate", [1, 8])
def test_long_prompts_end_sooner_and_short_ones_not_later(rate: int) -> None:
    load = (f"workload.rate={rate}", "workload.seed=1")

    (short, long), (short_off, long_off) = _ttft(*load), _ttft(*load, "schedule.spread=off")

    assert len(long) >= 3
    assert np.median(long) <= np.median(long_off) / 1.5
    assert np.percentile(short, 99) <= 1.03 * np.percentile(short_off, 99)
