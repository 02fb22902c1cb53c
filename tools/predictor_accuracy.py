"""How well step times are predicted: on a quiet machine, and after something takes a core away.

Random prompts and decodes share steps of an engine, so that sizes, contexts and batches vary. Each
step is predicted before it runs, and learned from only afterwards. Then another process spins on
one core, and the errors are told in the order of the steps.

Usage: python tools/predictor_accuracy.py [--steps 500] [--target 0.1] [--longest 16K]
       [--model bench] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mnemosyne import LLM, SamplingParams
from mnemosyne.config import parse_size
from mnemosyne.metrics import StepRecord

WARM_STEPS = 100  # not counted: the first steps correct what a sweep over an empty cache shows
WINDOW = 25  # steps
DISTURBED_STEPS = 150
NUM_RUNNING = 6


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


def errors_of(records: list[StepRecord]) -> np.ndarray:
    """Relative errors, float64 ``[steps]``."""
    return np.array([abs(record.predicted_s / record.actual_s - 1) for record in records])


def show(name: str, errors: np.ndarray) -> dict[str, float]:
    median, p95 = float(np.median(errors)), float(np.percentile(errors, 95))
    print(f"{name:<40} {len(errors):4d} steps: median {median:6.1%}  p95 {p95:6.1%}")
    return {"median": median, "p95": p95}


def start_s(model: str, cache: dict[str, int], *, saved_fit: bool) -> float:
    """Seconds to open an engine."""
    started_s = time.perf_counter()
    with LLM(model, cache=cache, schedule={"saved_fit": saved_fit}):
        return time.perf_counter() - started_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--target", type=float, default=0.1, help="seconds of a step")
    parser.add_argument("--longest", default="16K", help="tokens of a prompt, at most")
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
        show("quiet, while warming up", errors_of(records))
        records.clear()
        mixture.run(arguments.steps)
        outcome["quiet"] = show("quiet", errors_of(records))
        records.clear()
        with one_core_taken():
            mixture.run(DISTURBED_STEPS)
        errors = errors_of(records)
        outcome["one core taken"] = [
            show(f"one core taken, steps {first} to {first + WINDOW}", window)
            for first in range(0, DISTURBED_STEPS, WINDOW)
            if len(window := errors[first : first + WINDOW])
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
