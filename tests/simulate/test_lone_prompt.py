"""A prompt that nobody disturbs passes any pipeline as fast as with the best fixed chunk."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.cli.shapes import find_shape
from mnemosyne.joining.simulated import build_simulation
from mnemosyne.simulate.workload import Arrival
from tests.simulate.machines import simulate_config

SIZES = (256, 512, 1024, 2048, 4096)


def _ttft_s(model: str, num_tokens: int, *words: str) -> float:
    config = simulate_config(*words, model=model)
    (output,) = build_simulation(config, find_shape(model)).run([Arrival(0.0, num_tokens, 2)])
    assert output.metrics.ttft_s is not None
    return output.metrics.ttft_s


@pytest.mark.parametrize(
    ("num_tokens", "model", "words"),
    [
        (2**17, "llama3_8b", ("mesh.tp=8", "mesh.pp=16")),
        (40_000, "llama3_8b", ("mesh.tp=8", "mesh.pp=8")),
        (10_000, "llama3_70b", ("mesh.tp=8", "mesh.pp=16")),
        (40_000, "llama3_70b", ("mesh.tp=4", "mesh.kvp=2", "mesh.pp=4")),
        (20_000, "llama3_8b", ("hardware=a100_80", "mesh.pp=2")),
        (9_000, "bench", ("hardware=cpu_2core", "mesh.pp=2")),
        (9_000, "bench", ("hardware=cpu_2core",)),
        (3_000, "qwen3_235b_a22b", ("mesh.tp=4", "mesh.pp=2")),
        (10_000, "qwen3_235b_a22b", ("mesh.tp=4", "mesh.pp=8")),
    ],
)
def test_the_adaptive_chunk_is_within_a_twentieth_of_the_best_fixed_one(
    num_tokens: int, model: str, words: tuple[str, ...]
) -> None:
    fixed_s = [
        _ttft_s(model, num_tokens, *words, "schedule=fixed", f"schedule.chunk={size}")
        for size in SIZES
    ]

    assert _ttft_s(model, num_tokens, *words) <= 1.05 * min(fixed_s)


def test_short_prompts_pass_a_deep_pipeline_in_several_chunks() -> None:
    words = ("mesh.tp=8", "mesh.pp=16")
    whole_s = _ttft_s("llama3_70b", 1000, *words, "schedule=fixed", "schedule.chunk=1K")

    assert _ttft_s("llama3_70b", 1000, *words) < 0.6 * whole_s


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("llama3_8b", ("hardware=a100_80", "mesh.tp=8", "mesh.pp=2")),
        ("llama3_70b", ("mesh.tp=8", "mesh.pp=16")),
    ],
)
def test_whoever_comes_while_a_long_prompt_is_alone_gets_its_first_token_in_time(
    model: str, words: tuple[str, ...]
) -> None:
    config, shape = simulate_config(*words, model=model), find_shape(model)
    alone_s = build_simulation(config, shape).engine.scheduler.prefill_s(2**20)
    times_s = np.random.default_rng(0).uniform(0.05, 0.95, 8) * alone_s
    arrivals = [Arrival(0.0, 2**20, 1), *(Arrival(t, 300, 1) for t in np.sort(times_s).tolist())]

    _, *newcomers = build_simulation(config, shape).run(arrivals)

    assert not any(output.metrics.missed_deadline for output in newcomers)


def test_steps_that_newcomers_can_wait_for_cost_a_lone_prompt_nearly_nothing() -> None:
    words = ("mesh.tp=8", "mesh.pp=4")
    unbounded_s = _ttft_s("llama3_70b", 2**20, *words, "slo.ttft_min=60min")

    assert _ttft_s("llama3_70b", 2**20, *words) <= 1.01 * unbounded_s
