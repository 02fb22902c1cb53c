"""Step times of this machine: a sweep at start-up, and the measurements of earlier starts."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch

from mnemosyne.machine import instructions, processor_name
from mnemosyne.schedule.calibrate import Limits, Sample, calibrate, sweep
from mnemosyne.schedule.plan import Executor
from mnemosyne.schedule.predictor import LinearPredictor, fit_error
from mnemosyne.schedule.saved_fits import Key, Steps, fits_folder, load_fit, save_fit
from mnemosyne.schedule.work import WorkModel

log = logging.getLogger(__name__)

DISTURBED_FIT = 0.25  # median error of a fit on its own sweep beyond which it is not kept


def fit_step_times(
    predictor: LinearPredictor,
    executor: Executor,
    work_model: WorkModel,
    limits: Limits,
    key: Key,
    *,
    is_kept: bool,
) -> None:
    """Fit a predictor to a sweep, of which only those steps run that no earlier start has timed.

    Args:
        predictor: fitted here, unless the cache is too small for any step.
        executor: idle, with an empty cache.
        work_model: counts the work of each step.
        limits: of the sweep.
        key: all that the time of a step depends on.
        is_kept: whether to use what earlier starts measured, and to keep what this one does.
    """
    started_s = perf_counter()
    steps = load_fit(fits_folder(), key) if is_kept else {}
    if steps:
        predictor.fit_rows(np.stack(list(steps.values())))
        probes = calibrate(executor, work_model, limits, clock=perf_counter, is_probe=True)
        if not still_holds(predictor, probes):
            log.info("step times of an earlier start no longer hold; they are measured again")
            steps = {}
    known = {shape: float(row[-1]) for shape, row in steps.items()}
    found = sweep(executor, work_model, limits, clock=perf_counter, known=known)
    rows = {shape: np.array([*work.features(), s]) for shape, (work, s) in found.items()}
    steps |= rows
    if rows:
        predictor.fit_rows(np.stack(list(steps.values())))
        _judge(predictor, list(found.values()), steps, key, is_kept=is_kept)
    seconds = perf_counter() - started_s
    if known and not rows:
        log.info("step times of an earlier start, in %.1f s", seconds)
    else:
        log.info(
            "step times fitted from %d steps (%d new) in %.1f s", *(len(steps), len(rows), seconds)
        )


def still_holds(predictor: LinearPredictor, probes: Sequence[Sample]) -> bool:
    """Return whether a fit is right within a factor of two; online correction does the rest."""
    errors = [seconds / predictor.predict(work) for work, seconds in probes]
    return all(0.5 <= error <= 2.0 for error in errors)


def describe_machine(device: torch.device) -> dict[str, str]:
    """The processor, the share of it that is used, and the software that runs on it."""
    software = {"torch": torch.__version__}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        return software | {"hardware": name, "instructions": f"{major}.{minor}"}
    # Processors of one name differ in what a hypervisor or firmware lets them do.
    digest = hashlib.sha256(" ".join(instructions()).encode()).hexdigest()[:16]
    name = f"{processor_name()}, {torch.get_num_threads()} threads"
    return software | {"hardware": name, "instructions": digest}


def _judge(
    predictor: LinearPredictor, found: Sequence[Sample], steps: Steps, key: Key, *, is_kept: bool
) -> None:
    """Keep a fit for the next start if it explains what was measured."""
    error = fit_error(predictor, found)
    if error > DISTURBED_FIT:
        log.warning(
            "step times do not fit what a step does (median error %.0f%%), as on a busy machine; "
            "they are corrected as steps run, and measured again at the next start",
            100 * error,
        )
    elif is_kept:
        save_fit(fits_folder(), key, steps)
