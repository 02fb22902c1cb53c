"""Simulated runs that the page is made of: one long request, alone or beside a decode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mnemosyne import cli
from mnemosyne.cli.shapes import find_shape
from mnemosyne.config_simulate import SimulateConfig
from mnemosyne.joining.simulated import Simulation, build_simulation
from mnemosyne.simulate.workload import Arrival

OUTPUT = 32  # tokens after a long prompt, whose mean gap is its TPOT


def simulate_config(model: str, *words: str) -> SimulateConfig:
    """The config of ``mnemosyne simulate model=MODEL WORDS``."""
    config = cli.config_of("simulate", f"model={model}", *words)
    assert isinstance(config, SimulateConfig)
    return config


def layout(pp: int = 1, kvp: int = 1, tp: int = 8) -> list[str]:
    """Words of a mesh."""
    return [f"mesh.pp={pp}", f"mesh.kvp={kvp}", f"mesh.tp={tp}"]


def simulation(model: str, *words: str) -> Simulation:
    """An engine on simulated hardware."""
    return build_simulation(simulate_config(model, *words), find_shape(model))


@dataclass(frozen=True, slots=True)
class Long:
    """Times of a long request; seconds."""

    ttft_s: float
    tpot_s: float
    fits: bool  # whether the memory of the hardware holds it


def serve_alone(model: str, context: int, *words: str, kvp: int = 1) -> Long:
    """Prefill and decode one request with nobody beside it.

    Where the memory does not hold it, it is served as if it did, and ``fits`` says so.

    Args:
        model: a shape.
        context: tokens of the prompt.
        words: of the config, the mesh among them.
        kvp: groups that its cache lies on, evenly.
    """
    shard = -(-(context + OUTPUT) // (kvp * 128)) * 128  # whole pages
    groups = [f"cache.max_tokens_per_group={shard}"] if kvp > 1 else []
    run = simulation(model, *words, *groups)
    fits = run.engine.scheduler.ledger.max_request_tokens() >= context + OUTPUT
    if not fits:
        run = simulation(model, *words, *groups, "hardware.memory_gb=100000")
    (output,) = run.run([Arrival(0.0, context, OUTPUT)])
    assert output.metrics.ttft_s is not None
    return Long(output.metrics.ttft_s, float(np.mean(output.metrics.tbt_s)), fits)


@dataclass(frozen=True, slots=True)
class Beside:
    """A long prefill and a decode beside it; seconds."""

    ttft_s: float  # of the long prompt
    tbt_p50_s: float  # of the decode, while the prompt is prefilled
    tbt_p99_s: float
    tbt_max_s: float


def serve_beside(model: str, context: int, *words: str) -> Beside:
    """Prefill one long prompt while one short request decodes."""
    run = simulation(model, *words)
    engine = run.engine
    decode = engine.accept(Arrival(0.0, 1000, 10_000_000 // 32).request(0))
    while not decode.token_ids:
        engine.step()
    started_s, before = run.cluster.now_s, len(decode.metrics.tbt_s)
    long = engine.accept(Arrival(started_s, context, 1).request(1))
    while not long.token_ids:
        engine.step()
    gaps = decode.metrics.tbt_s[before:]
    assert long.metrics.ttft_s is not None
    return Beside(long.metrics.ttft_s, *np.percentile(gaps, [50, 99]).tolist(), max(gaps))
