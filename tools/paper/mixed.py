"""Short and long requests together, under each scheduler, at several rates; the same seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from runs import layout, simulate_config, simulation

from mnemosyne.cli.shapes import find_shape
from mnemosyne.joining.simulated import build_simulation
from mnemosyne.simulate.report import tpot_s
from mnemosyne.simulate.workload import draw

ON_TIME = 0.9  # share of first tokens that a scheduler must bring in time at its capacity
LONG = 128 * 1024  # tokens; from here on a prompt is one of the long ones

ADAPTIVE = ["schedule.chunk=adaptive"]
SCHEDULERS: dict[str, list[str]] = {
    "fcfs, adaptive": [*ADAPTIVE, "schedule.policy=fcfs"],
    "edf": [*ADAPTIVE, "schedule.policy=edf"],
    "lrs": [*ADAPTIVE, "schedule.policy=lrs"],
    "lars": [*ADAPTIVE, "schedule.policy=lars"],
    "lrs, not packed": [*ADAPTIVE, "schedule.policy=lrs", "schedule.max_relative_slack=0.0"],
    "lars, not packed": [*ADAPTIVE, "schedule.policy=lars", "schedule.max_relative_slack=0.0"],
    "vLLM-like, 512": ["schedule.policy=fcfs", "schedule.chunk=512"],
    "vLLM-like, 2048": ["schedule.policy=fcfs", "schedule.chunk=2K"],
    # Both instances on every prefill at perfect efficiency: one of twice the peaks.
    "LoongServe-like": [
        *("schedule.policy=fcfs", "schedule.chunk=1M", "mesh.pp=1"),
        *("hardware.peak_tflops=624", "hardware.memory_gb_per_s=4078", "hardware.memory_gb=160"),
        "hardware.node_gb_per_s=600",
    ],
}
MIX_70B = {  # two and three axes on 64 GPUs
    "SPP 8": layout(pp=8),
    "SPP 4, KVP 2": [*layout(pp=4, kvp=2), "cache.max_tokens_per_group=1040K"],
    "SPP 2, KVP 4": [*layout(pp=2, kvp=4), "cache.max_tokens_per_group=520K"],
}
A100 = ["hardware=a100_80", *layout(pp=2), "schedule.max_sequences=256"]


@dataclass(frozen=True, slots=True)
class Mix:
    """Times of a workload under one scheduler; seconds, percentiles 50, 95 and 99."""

    rate: float
    ttft_s: list[float]  # of all requests
    short_ttft_s: list[float]
    long_ttft_s: list[float]
    tbt_s: list[float]  # gaps of all requests together
    tpot_s: list[float]  # mean gaps of the short ones
    long_tpot_s: list[float]
    on_time: float  # share of requests whose first token met its deadline


def serve_mix(
    model: str, platform: list[str], scheduler: list[str], rate: float, num_requests: int
) -> Mix:
    """Serve a drawn workload to its end.

    A first token is due after twice the time of its prefill alone, at least a second: the same
    deadlines for every scheduler, by the predictor of the platform with the usual one.
    """
    load = [f"workload.rate={rate}", f"workload.num_requests={num_requests}"]
    config = simulate_config(model, *platform, *scheduler, *load)
    alone_s = simulation(model, *platform).engine.scheduler.prefill_s
    arrivals = [
        replace(arrival, deadline_s=max(1.0, 2 * alone_s(arrival.prompt_tokens)))
        for arrival in draw(config.workload)
    ]
    outputs = build_simulation(config, find_shape(model)).run(arrivals)
    assert all(output.error is None for output in outputs)
    lengths = np.array([arrival.prompt_tokens for arrival in arrivals])
    ttft = np.array([output.metrics.ttft_s for output in outputs], dtype=np.float64)
    deadline = np.array([arrival.deadline_s for arrival in arrivals], dtype=np.float64)
    is_long = lengths >= LONG
    gaps = np.concatenate([output.metrics.tbt_s for output in outputs])
    tpots = np.array([tpot_s(output) or np.nan for output in outputs])
    tpots, is_long_tpot = tpots[~np.isnan(tpots)], is_long[~np.isnan(tpots)]
    return Mix(
        rate,
        _percentiles(ttft),
        _percentiles(ttft[~is_long]),
        _percentiles(ttft[is_long]),
        _percentiles(gaps),
        _percentiles(tpots[~is_long_tpot]),
        _percentiles(tpots[is_long_tpot]),
        float(np.mean(ttft <= deadline)),
    )


def capacity(model: str, platform: list[str], scheduler: list[str], num_requests: int) -> float:
    """The highest rate at which 90% of first tokens meet their deadlines, to 10%; requests/s."""

    def holds(rate: float) -> bool:
        return serve_mix(model, platform, scheduler, rate, num_requests).on_time >= ON_TIME

    low, high = 0.0, 0.02
    while holds(high):
        low, high = high, 2 * high
    while high > 1.1 * max(low, 0.001):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _percentiles(values: Any) -> list[float]:
    if len(values) == 0:
        return [float("nan")] * 3
    return [float(value) for value in np.percentile(values, [50, 95, 99])]
