"""Doors, as the fuzzer sees them, and the findings at each."""

from __future__ import annotations

import random
import reprlib
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from resource import getpagesize
from types import FrameType
from typing import Any

MAX_FAULTS = 20  # a run ends after this many
NUM_WARM = 200  # inputs before memory is measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """One place where input comes in.

    Args:
        name: what it is called on the command line.
        draw: makes an input, by the random numbers that it is given alone.
        feed: hands an input in; whether it was accepted. What it raises is a fault, so a refusal
            that is as it should be is caught in here.
        control: a request with a known answer, right after each input; raises if it has another.
        limit_s: time that an input and its control may take.
    """

    name: str
    draw: Callable[[random.Random], Any]
    feed: Callable[[Any], bool]
    control: Callable[[], None]
    limit_s: float = 5.0


@dataclass(slots=True)
class Report:
    """Findings of a run. Memory in bytes, times in seconds."""

    name: str
    num_inputs: int = 0
    num_accepted: int = 0
    slowest_s: float = 0.0
    growth_bytes: int = 0  # of resident memory, after the first inputs
    faults: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> float:
        """The part of the inputs that was accepted, in [0, 1]."""
        return self.num_accepted / max(1, self.num_inputs)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_inputs:,} inputs, {self.accepted:.0%} accepted, "
            f"slowest {self.slowest_s:.2f} s, memory +{self.growth_bytes / 2**20:.0f} MiB, "
            f"{len(self.faults)} faults"
        )


class TooSlow(BaseException):
    """Raised in the middle of an input that takes longer than its door allows."""


def fuzz(door: Door, number: int, seed: int) -> Report:
    """Feed a number of inputs to a door; input ``i`` depends on the seed and ``i`` alone."""
    report, memory_bytes = Report(door.name), 0
    for index in range(number):
        if index == min(NUM_WARM, number - 1):
            memory_bytes = resident_bytes()
        given = door.draw(random.Random(f"{door.name}/{seed}/{index}"))
        start_s = time.perf_counter()
        try:
            with at_most(door.limit_s):
                report.num_accepted += door.feed(given)
                door.control()
        except (Exception, TooSlow) as error:  # noqa: BLE001  # whatever it is, it is a fault
            report.faults.append(_describe(index, given, error))
        report.num_inputs += 1
        report.slowest_s = max(report.slowest_s, time.perf_counter() - start_s)
        if len(report.faults) == MAX_FAULTS:
            break
    report.growth_bytes = max(0, resident_bytes() - memory_bytes)
    return report


@contextmanager
def at_most(limit_s: float) -> Iterator[None]:
    """Raise ``TooSlow`` in the body once it has taken ``limit_s``."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"it takes more than {limit_s} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()


def _describe(index: int, given: object, error: BaseException) -> str:
    try:
        shown = repr(given)[:400]
    except Exception:  # noqa: BLE001  # some inputs are made so
        shown = reprlib.repr(type(given))
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    return f"input {index}: {shown}\n    {type(error).__name__} at {place}: {str(error)[:200]}"
