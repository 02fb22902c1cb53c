"""The one way to join an engine: over a rank, a mesh, a simulated cluster or what a bench wraps."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from mnemosyne.cache.capacity import kinds_of, most_rows, tokens_per_group
from mnemosyne.config import CacheConfig, MeshConfig, ScheduleConfig, SloConfig
from mnemosyne.metrics import StepRecord
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.calibrate import Limits
from mnemosyne.schedule.plan import Executor
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.saves import Disk
from mnemosyne.schedule.work import WorkModel
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.intake import Intake
from mnemosyne.shape import ModelShape

Sweep = Callable[[WorkModel, Limits], None]  # times steps within the limits and fits a predictor


class ServingConfig(Protocol):
    """The part of a config that serving depends on, of a real engine and a simulated one alike."""

    mesh: MeshConfig
    schedule: ScheduleConfig
    slo: SloConfig
    cache: CacheConfig


def join(
    executor: Executor,
    shape: ModelShape,
    intake: Intake,
    config: ServingConfig,
    *,
    num_pages: int,
    predictor: Predictor,
    sweep: Sweep | None = None,
    clock: Callable[[], float] = time.perf_counter,
    on_step: Callable[[StepRecord], None] | None = None,
    fingerprint: bytes | None = None,
    disk: Disk | None = None,
) -> Engine:
    """Scheduler, executor and intake as one engine, before its first request.

    Args:
        executor: runs the steps.
        shape: of the whole model.
        intake: checks prompts and parameters.
        config: mesh, schedule, cache and deadlines.
        num_pages: of each group.
        predictor: step time.
        sweep: fits the predictor; put off until ``Engine.measure``.
        clock: seconds; a simulation brings its own.
        on_step: called with the record of each step.
        fingerprint: of a model whose requests share prefixes; None: they share nothing.
        disk: where prefixes outlive the process, if anywhere.
    """
    num_groups, kinds = config.mesh.kvp, kinds_of(shape.windows, config.cache)
    work_model = WorkModel(shape.windows, num_groups, unread_share=shape.unread_share())
    scheduler = build_scheduler(
        config.schedule,
        config.slo,
        num_groups=num_groups,
        num_pages=num_pages,
        page_size=config.cache.page_size,
        max_tokens_per_group=tokens_per_group(config.cache, num_pages, kinds),
        predictor=predictor,
        work_model=work_model,
        depth=executor.depth,
        fingerprint=fingerprint,
        disk=disk,
        kinds=kinds,
    )
    limits = Limits(
        num_pages=num_pages,
        kinds=kinds,
        max_rows=most_rows(config.schedule),
        max_positions=intake.max_positions,
        vocab_size=intake.vocab_size,
        step_s=2 * config.schedule.target_tbt_s,
    )
    measure = None if sweep is None else partial(sweep, work_model, limits)
    return Engine(scheduler, executor, intake, clock=clock, on_step=on_step, measure=measure)
