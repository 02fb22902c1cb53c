"""The accuracy of predicted step times: on a quiet machine, and after something takes a core away.

Random prompts and decodes share steps of an engine, so that sizes, contexts and batches vary. Each
step is predicted before it runs, and learned from only afterwards. Then another process spins on
one core, and goes away again, and the errors are told in the order of the steps. No prediction can
be nearer than one and the same step is to itself: so a step is repeated as well, with and without
the other process. How much it scatters depends on whether OpenMP's threads spin while they wait
for one that was put off its core (their default) or sleep (OMP_WAIT_POLICY=passive).

Usage: python tools/predictor_accuracy.py [--steps 500] [--target 0.1] [--longest 16K]
       [--limit 0.05] [--model bench] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np

from mnemosyne import LLM, SamplingParams
from mnemosyne.config import parse_size
from mnemosyne.metrics import StepRecord

WARM_STEPS = 100  # not counted: the first steps correct what a sweep over an empty cache shows
WINDOW = 25  # steps
DISTURBED_STEPS = 150
NUM_RUNNING = 6
SAME_STEPS = 100  # repeats of one step
SAME_DECODES, SAME_CONTEXT, SAME_CHUNK = 4, 512, 128  # what is in it, tokens


class Mixture:
    """An engine that is kept busy with prompts and decodes of all sizes."""

    def __init__(self, llm: LLM, longest: int) -> None:
        self._engine = llm.engine
        self._rng = np.random.default_rng(0)
        self._longest = longest

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            while len(self._engine.unfinished()) < NUM_RUNNING:
                self._add()
            self._engine.step()

    def _add(self) -> None:
        length = int(np.exp(self._rng.uniform(np.log(16), np.log(self._longest))))
        max_tokens = int(self._rng.integers(8, 64))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self._engine.add(self._rng.integers(0, 32_000, length), params)


@contextmanager
def one_core_taken() -> Iterator[None]:
    """Another process spins on the first core that this one may use."""
    core = min(os.sched_getaffinity(0))
    code = f"import os\nos.sched_setaffinity(0, [{core}])\nwhile True: pass"
    spinner = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        spinner.kill()
        spinner.wait()


def ratios_of(records: list[StepRecord]) -> np.ndarray:
    """Predicted by actual times, float64 ``[steps]``."""
    return np.array([record.predicted_s / record.actual_s for record in records])


def show(name: str, ratios: np.ndarray) -> dict[str, float]:
    errors = np.abs(ratios - 1)
    median, p95 = float(np.median(errors)), float(np.percentile(errors, 95))
    level = float(np.median(ratios))
    print(
        f"{name:<34} {len(errors):4d} steps: error median {median:6.1%}  p95 {p95:6.1%}   "
        f"predicted / actual median {level:5.2f}"
    )
    return {"median": median, "p95": p95, "level": level}


def steps_until(limit: float, errors: np.ndarray) -> int | None:
    """The number of steps before the first ``WINDOW`` in a row whose median is under the limit."""
    windows = np.lib.stride_tricks.sliding_window_view(errors, WINDOW)
    within = np.flatnonzero(np.median(windows, axis=1) < limit)
    return int(within[0]) if len(within) else None


def level_steps_until(limit: float, ratios: np.ndarray) -> int | None:
    """The same of the median ratio's own error: whether predictions are right on the whole."""
    windows = np.lib.stride_tricks.sliding_window_view(ratios, WINDOW)
    within = np.flatnonzero(np.abs(np.median(windows, axis=1) - 1) < limit)
    return int(within[0]) if len(within) else None


def show_recovery(name: str, ratios: np.ndarray, limit: float) -> dict[str, object]:
    """Windows of the steps after a change, and how soon they are right again."""
    windows = [
        show(f"{name}, steps {first} to {first + WINDOW}", ratios[first : first + WINDOW])
        for first in range(0, len(ratios), WINDOW)
    ]
    level, error = level_steps_until(limit, ratios), steps_until(limit, np.abs(ratios - 1))
    print(
        f"{name}: over {WINDOW} steps, the median prediction is within {limit:.0%} "
        f"{_after(level)}, the median error {_after(error)}"
    )
    return {"windows": windows, "level_steps": level, "error_steps": error}


def _after(steps: int | None) -> str:
    return f"never in {DISTURBED_STEPS} steps" if steps is None else f"after {steps} steps"


def scatter(model: str, *, is_disturbed: bool) -> dict[str, float]:
    """One step again and again: how far it is from its own median."""
    seconds: list[float] = []
    rng = np.random.default_rng(1)
    cache, schedule = {"max_tokens": "16K"}, {"chunk": 2 * SAME_CHUNK}

    def add(num_tokens: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        llm.engine.add(rng.integers(0, 32_000, num_tokens), params)

    with LLM(
        model,
        schedule=schedule,
        cache=cache,
        on_step=lambda record: seconds.append(record.actual_s),
    ) as llm:
        for _ in range(SAME_DECODES):
            add(SAME_CONTEXT, 2 * SAME_STEPS)
        while not all(output.token_ids for output in llm.engine.unfinished()):
            llm.engine.step()
        seconds.clear()
        with one_core_taken() if is_disturbed else nullcontext():
            for _ in range(SAME_STEPS):
                add(SAME_CHUNK, 1)
                llm.engine.step()
        llm.engine.abort("cancelled")
    name = "one core taken" if is_disturbed else "quiet"
    ratios = np.median(seconds) / np.array(seconds)
    return show(f"one step repeated, {name}", ratios) | {"seconds": float(np.median(seconds))}


def start_s(model: str, cache: dict[str, int], *, saved_fit: bool) -> float:
    """Seconds to open an engine."""
    started_s = time.perf_counter()
    with LLM(model, cache=cache, schedule={"saved_fit": saved_fit}) as llm:
        llm.engine.measure()
        return time.perf_counter() - started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--target", type=float, default=0.1, help="seconds of a step")
    parser.add_argument("--longest", default="16K", help="tokens of a prompt, at most")
    parser.add_argument("--limit", type=float, default=0.05, help="an error that is recovered")
    parser.add_argument("--model", default="bench")
    parser.add_argument("--json", help="write the outcome to this file")
    arguments = parser.parse_args()
    longest = parse_size(arguments.longest, "--longest")
    cache = {"max_tokens": NUM_RUNNING * (longest + 256)}
    schedule = {"target_tbt": arguments.target, "saved_fit": False}
    records: list[StepRecord] = []
    outcome: dict[str, object] = {}
    with LLM(arguments.model, schedule=schedule, cache=cache, on_step=records.append) as llm:
        mixture = Mixture(llm, longest)
        mixture.run(WARM_STEPS)
        show("quiet, while warming up", ratios_of(records))
        records.clear()
        mixture.run(arguments.steps)
        outcome["quiet"] = show("quiet", ratios_of(records))
        for name in ("one core taken", "core given back"):
            records.clear()
            with one_core_taken() if name == "one core taken" else nullcontext():
                mixture.run(DISTURBED_STEPS)
            outcome[name] = show_recovery(name, ratios_of(records), arguments.limit)
        llm.engine.abort("cancelled")
    outcome["scatter"] = [
        scatter(arguments.model, is_disturbed=is_disturbed) for is_disturbed in (False, True)
    ]
    starts = {
        name: start_s(arguments.model, cache, saved_fit=saved_fit)
        for name, saved_fit in (("measured", False), ("saving", True), ("saved", True))
    }
    print("seconds to start:", ", ".join(f"{name} {s:.2f}" for name, s in starts.items()))
    outcome["start_s"] = starts
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(outcome, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
