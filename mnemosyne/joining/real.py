"""The engine over a real executor: rank 0 plans for all, by step times that it measures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from mnemosyne.config import EngineConfig
from mnemosyne.joining.engine import Sweep, join
from mnemosyne.joining.rank import Rank
from mnemosyne.joining.roofline import expected_rates, measure_peaks
from mnemosyne.joining.step_times import describe_machine, fit_step_times
from mnemosyne.metrics import StepRecord
from mnemosyne.runtime.executor import Crew, LocalExecutor, MeshExecutor
from mnemosyne.schedule.calibrate import Limits
from mnemosyne.schedule.foreign_predictor import ForeignPredictor
from mnemosyne.schedule.plan import Executor
from mnemosyne.schedule.predictor import LinearPredictor, Predictor
from mnemosyne.schedule.work import WorkModel
from mnemosyne.serve.engine import Engine

log = logging.getLogger(__name__)


def build_engine(
    rank: Rank,
    config: EngineConfig,
    *,
    crew: Crew | None = None,
    executor: Executor | None = None,
    predictor: Predictor | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Engine:
    """The engine of rank 0, which plans for all.

    Args:
        rank: what this process holds.
        config: all choices.
        crew: the other ranks, which follow by now; None if there are none.
        executor: what a bench puts around ``executor_of``; None: that itself.
        predictor: step time, in place of the one fitted by a sweep here, until it fails.
        on_step: called with the record of each step.
    """
    config = _without_slices(config, rank)
    executor = executor or executor_of(rank, crew)
    ours = LinearPredictor(_prior(config, rank))
    is_fitted = predictor is None and config.schedule.is_adaptive
    engine = join(
        executor,
        rank.checkpoint.spec,
        rank.intake,
        config,
        num_pages=rank.num_pages,
        predictor=ours if predictor is None else ForeignPredictor(predictor, ours),
        sweep=_sweep(ours, executor, config, rank) if is_fitted else None,
        on_step=on_step,
        fingerprint=_fingerprint(rank) if config.cache.prefix == "auto" else None,
        disk=rank.leaves,
    )
    if crew is not None:
        engine.measure()  # the other ranks follow now; later they may be elsewhere
    return engine


def _without_slices(config: EngineConfig, rank: Rank) -> EngineConfig:
    """The same where slices can be handed down; elsewhere each prompt stays in its own group."""
    device = rank.worker.pool.k[0].device.type
    if device == "cpu" or config.mesh.kvp == 1 or config.schedule.spread == "off":
        return config
    log.info("schedule.spread=auto spreads no prompt on %s: slices are handed down on CPUs", device)
    return replace(config, schedule=replace(config.schedule, spread="off"))


def executor_of(rank: Rank, crew: Crew | None = None) -> Executor:
    """Runs plans on this rank, and on the others if there are any."""
    if crew is None:
        return LocalExecutor(rank.worker)
    mesh = rank.mesh
    return MeshExecutor(
        rank.worker,
        crew,
        num_groups=mesh.kvp.degree,
        num_stages=mesh.pp.degree,
        num_ranks=mesh.world_size,
    )


def fit_key(config: EngineConfig, rank: Rank) -> dict[str, str]:
    """All that the time of a step depends on, the machine apart, for a fit to be found again."""
    keys = rank.worker.pool.k[0]
    return {
        "model": repr(rank.checkpoint.spec),
        "layout": repr(config.mesh),
        "dtype": str(keys.dtype),
        "backend": rank.backend,
        "operators": rank.operators,
        "compile": config.compile,
        "pages": f"{config.cache.page_size} tokens",
        **describe_machine(keys.device),
    }


def _fingerprint(rank: Rank) -> bytes:
    """The identity of this process's model, where other processes may read its pages."""
    if rank.leaves is not None:
        return bytes.fromhex(rank.leaves.folder.layout.model)
    spec, dtype = rank.checkpoint.spec, rank.worker.pool.k[0].dtype
    return f"{rank.checkpoint.name} {spec!r} {dtype}".encode()


def _sweep(
    predictor: LinearPredictor, executor: Executor, config: EngineConfig, rank: Rank
) -> Sweep:
    def sweep(work_model: WorkModel, limits: Limits) -> None:
        key, is_kept = fit_key(config, rank), config.schedule.saved_fit
        fit_step_times(predictor, executor, work_model, limits, key, is_kept=is_kept)

    return sweep


def _prior(config: EngineConfig, rank: Rank) -> tuple[float, ...]:
    """Seconds that steps should take, before any is measured."""
    keys, spec = rank.worker.pool.k[0], rank.checkpoint.spec
    shape = replace(spec, dtype=str(keys.dtype).removeprefix("torch."))
    return expected_rates(shape, config.mesh, measure_peaks(keys.device, keys.dtype))
