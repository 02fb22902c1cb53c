"""The whereabouts of a thread: its task, the collective it waits in, its line."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from msgspec import Struct

# Collectives are spelled in these alone; a thread inside one waits for other ranks.
COLLECTIVES = ("mnemosyne.parallel.board", "mnemosyne.parallel.collectives")
MEETING_PLACES = (
    *COLLECTIVES,
    "mnemosyne.parallel.control",
    "mnemosyne.parallel.pipeline",
    "mnemosyne.attention.kvp",
)
PACKAGE = "mnemosyne"
WATCHDOG = "mnemosyne.parallel.watchdog"  # around every task, so it says nothing
DISTRIBUTED = "torch.distributed."

Stack = Iterable[tuple[FrameType, int]]  # frames and lines, innermost first


@dataclass(frozen=True, slots=True)
class Task:
    """Work of a thread that must not take for ever."""

    name: str
    thread: int
    limit_s: float
    is_fatal: bool  # whether an exception in it leaves the ranks out of step
    started_s: float = field(default_factory=time.monotonic)


class Whereabouts(Struct, array_like=True, frozen=True):
    """The whereabouts of a rank."""

    task: str | None = None  # None: nothing that others wait for
    seconds: float = 0.0  # since it began
    collective: str | None = None  # that it waits in
    place: str = ""
    paused_s: float = 0.0  # of these seconds, how long its process did not run

    def __str__(self) -> str:
        if self.task is None:
            return "idle"
        if self.collective is None:
            return f"in {self.task} ({self.place})"
        line = self.place.partition(" ")[0]  # the collective has the name of the function
        return f"in {self.task}, {self.collective} ({line})"


def whereabouts(task: Task | None, stack: Stack) -> Whereabouts:
    """The whereabouts of a thread.

    Args:
        task: that it is in.
        stack: its frames, see ``live_stack`` and ``broken_stack``.
    """
    collective, place = locate(stack)
    if task is None:
        return Whereabouts(None, 0.0, collective, place)
    return Whereabouts(task.name, time.monotonic() - task.started_s, collective, place)


def live_stack(frame: FrameType | None) -> Stack:
    """The frames of a thread that runs, as ``sys._current_frames`` has them."""
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def broken_stack(error: BaseException) -> Stack:
    """The frames that the first cause of an exception went through."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return reversed(frames)


def locate(stack: Stack) -> tuple[str | None, str]:
    """The collective that a stack ends in, if it does, and the innermost line of the package.

    A function that computes inside a pipeline stage has collectives further out on its stack; only
    the innermost frame of the package, or of torch.distributed, tells. Collectives that are made of
    others have the name of the outermost.
    """
    place, collective, axis = "", None, None
    has_met = False
    for frame, line in stack:
        module = str(frame.f_globals.get("__name__", ""))
        name = frame.f_code.co_name
        if not place:
            place = _place(frame, line)
        if module.startswith(DISTRIBUTED):
            collective = collective or name
        elif module.partition(".")[0] == PACKAGE and module != WATCHDOG:
            if has_met and module not in COLLECTIVES:
                break
            place = _place(frame, line)
            if module not in MEETING_PLACES:
                break
            has_met, collective, axis = True, name.lstrip("_"), _axis(frame) or axis
            if module not in COLLECTIVES:
                break
    return f"{collective} over {axis}" if has_met and axis else collective, place


def _axis(frame: FrameType) -> str | None:
    """The axis of the mesh that a function of a meeting place works on."""
    owner = frame.f_locals.get("self")
    axis = frame.f_locals.get("axis", getattr(owner, "_axis", None))
    return getattr(axis, "name", None) or getattr(owner, "axis_name", None)


def _place(frame: FrameType, line: int) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{line} {frame.f_code.co_name}"
