"""Efficiencies from measured steps: the share of the peaks that a machine reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import EfficiencyConfig, HardwareConfig
from mnemosyne.metrics import StepRecord
from mnemosyne.schedule.least_squares import nonnegative_least_squares
from mnemosyne.schedule.plan import Chunk, Plan
from mnemosyne.shape import ModelShape
from mnemosyne.simulate.cluster import SimulatedCluster
from mnemosyne.simulate.cost import GroupLoad, Rates, StepCost

ROUNDS = 12  # each decides again which side of its roofline every part of a step is on
KEPT = 0.9  # share of the steps that count: a hiccup of the machine is no property of it
LEAST_STEPS = 20
SHARES = ("gemm", "attention", "weights", "kv", "links")
TIMES = {
    "node_messages": "node_latency",
    "network_messages": "network_latency",
    "layers": "layer_overhead",
    "steps": "step_overhead",
}


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of a fit.

    Attributes:
        efficiency: the constants; those that the steps say nothing about are as before.
        error_p50: median relative error of the time of a step.
        error_p95: its 95th percentile.
    """

    efficiency: EfficiencyConfig
    error_p50: float
    error_p95: float


def fit_efficiency(
    records: Sequence[StepRecord],
    shape: ModelShape,
    hardware: HardwareConfig,
    start: EfficiencyConfig,
) -> Fit:
    """Fit the efficiencies to the steps of a run on one rank.

    The time of a step is linear in the inverse efficiencies once it is known whether each part is
    bound by operations or by bytes: so the two are settled in turn. Errors are relative.

    Args:
        records: of a run of one process, as ``metrics.path`` writes them.
        shape: its model.
        hardware: its machine.
        start: where to begin, and what stays where the steps do not tell.

    Raises:
        ValueError: if there are too few steps.
    """
    if len(records) < LEAST_STEPS:
        raise ValueError(
            f"calibration must hold at least {LEAST_STEPS} steps, got {len(records)}; record a "
            "longer run"
        )
    # the first steps of a process pay for what is set up once
    records = records[len(records) // 20 :]
    seconds = np.array([record.actual_s for record in records])
    kinds = [
        np.array([bool(record.chunks) == prefills for record in records]) for prefills in (0, 1)
    ]
    efficiency, kept = start, np.ones(len(records), dtype=bool)
    for _ in range(ROUNDS):
        cost = StepCost(shape, hardware, efficiency, MeshConfig(), [shape.num_layers])
        rows = np.array([cost.terms([_load(cost, record)]) for record in records])
        # steps with prompts and steps without weigh the same, however many there are of each
        weights = sum(kept * kind / max(1, np.count_nonzero(kept & kind)) for kind in kinds)
        rates = _solve(rows, seconds, np.sqrt(weights), Rates.of(efficiency))
        errors = np.abs(rows @ rates / seconds - 1)
        for kind in kinds:
            if kind.any():
                kept[kind] = errors[kind] <= np.quantile(errors[kind], KEPT)
        efficiency = _efficiency(rates)
    cost = StepCost(shape, hardware, efficiency, MeshConfig(), [shape.num_layers])
    predicted = np.array([cost.stage_s([_load(cost, record)])[0] for record in records])
    errors = np.abs(predicted / seconds - 1)
    return Fit(efficiency, *np.quantile(errors, [0.5, 0.95]).tolist())


def _load(cost: StepCost, record: StepRecord) -> GroupLoad:
    """The load of the only group in a measured step."""
    chunks = tuple(Chunk(request, start, count, False) for request, start, count in record.chunks)
    (load,) = SimulatedCluster(cost).loads(Plan(index=0, chunks=chunks))
    load.rows += record.num_decodes
    load.num_sampled = record.num_sampled
    load.decode_keys = float(record.decode_keys)
    return load


def _solve(rows: np.ndarray, seconds: np.ndarray, weights: np.ndarray, before: Rates) -> np.ndarray:
    """Rates that give the measured times; those that no step depends on stay."""
    names = [entry.name for entry in fields(Rates)]
    rates = np.array([getattr(before, name) for name in names])
    told = rows.any(axis=0)
    relative = rows[:, told] * (weights / seconds)[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-30)
    rates[told] = nonnegative_least_squares(relative / scale, weights) / scale
    # no more than the peak; what came out as nothing cannot be told from the other parts
    limits = np.array([1.0 if name in SHARES else 0.0 for name in names])
    return np.maximum(rates, limits)


def _efficiency(rates: np.ndarray) -> EfficiencyConfig:
    values = dict(zip((entry.name for entry in fields(Rates)), rates.tolist(), strict=True))
    shares = {name: 1 / values[name] for name in SHARES}
    return EfficiencyConfig(**shares, **{key: values[name] for name, key in TIMES.items()})
