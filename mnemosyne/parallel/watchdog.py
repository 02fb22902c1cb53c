"""Ends every rank, with one line that says why, when one of them dies, fails or is stuck.

Collectives wait in C++ for ranks that will never come, so a thread beside them does the watching.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NoReturn

from msgspec.structs import replace

from mnemosyne.parallel.address import Store
from mnemosyne.parallel.keys import MeshKey
from mnemosyne.parallel.links import Answer, Ask, Left, Verdict, Word, open_links
from mnemosyne.parallel.pauses import Pauses
from mnemosyne.parallel.signals import Signals
from mnemosyne.parallel.termination import Termination
from mnemosyne.parallel.trouble import CAUSES, Kind, Trouble, judge
from mnemosyne.parallel.whereabouts import (
    Task,
    Whereabouts,
    broken_stack,
    live_stack,
    whereabouts,
)
from mnemosyne.process import INTERRUPTED, TERMINATED

log = logging.getLogger(__name__)

FAILED = 1  # exit status of a rank that is ended
TICK_S = 0.2
SETTLE_S = 0.5  # from the first cause to the verdict: others may tell more
DOUBT_S = 2.0  # the same while only consequences are known
JUDGE_S = 5.0  # after which a rank ends without a verdict
TERM_S = 8.0  # for rank 0 to end by itself after SIGTERM, and print what is finished
GRACE_S = 5.0  # for other ranks to end by themselves when one ended properly
FAREWELL_S = 3.0  # for the last line, and for reporting requests that are lost
CONNECT_S = 300.0  # other ranks may still be importing torch

MAX_TEXT = 1000  # characters of an error that other ranks are told

LEAST_STEP_S = 10.0
STEP_FACTOR = 20.0
UNKNOWN_STEP_S = 1800.0
FIRST_STEPS = 16  # of an engine, in which kernels may still be compiled
FIRST_STEP_S = 300.0


def step_limit(predicted_s: float, index: int = FIRST_STEPS) -> float:
    """Seconds after which a step counts as stuck.

    Args:
        predicted_s: how long it should take; 0 if the predictor knows nothing yet.
        index: of the step; the first ones may compile kernels.
    """
    limit_s = max(LEAST_STEP_S, STEP_FACTOR * predicted_s) if predicted_s > 0 else UNKNOWN_STEP_S
    return max(limit_s, FIRST_STEP_S) if index < FIRST_STEPS else limit_s


class Watchdog:
    """Watches this rank's tasks and its connection to the others. Every rank opens one at once.

    Args:
        store: shared by all ranks, as torch.distributed has it.
        rank: this one.
        world_size: how many there are.
        label: what this one is called, "pp0/kvp0/tp0".
        timeout_s: how long to wait for the others.
        key: of the mesh, from a file; None: a new one, for ranks of one host.

    Raises:
        RuntimeError: naming the ranks that did not come.

    Example:
        >>> with watchdog.watch_step(plan.index, plan.predicted_s):
        ...     worker.run(plan)
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        label: str,
        timeout_s: float = CONNECT_S,
        key: MeshKey | None = None,
    ) -> None:
        self.on_end: Callable[[str], None] | None = None  # told why, just before the end
        self._rank = rank
        self._label = label
        self._links = open_links(
            store, rank=rank, world_size=world_size, label=label, timeout_s=timeout_s, key=key
        )
        self._task: Task | None = None
        self._reports: deque[Trouble] = deque()  # from this rank's own threads
        self._troubles: list[Trouble] = []
        self._first_trouble_s = math.inf
        self._answers: dict[int, Whereabouts | None] = dict.fromkeys(self._links.peers)
        self._left: dict[int, tuple[float, str]] = {}  # when and why, by rank
        self._goodbye: Left | None = None
        self._failed_at: Whereabouts | None = None
        self._is_stuck = False
        self._is_shielded = False
        self._pauses = Pauses(TICK_S)
        self._termination = Termination()
        self._interrupts = 0  # since the task began that must not be cut short
        # Under torchrun, a rank whose launcher is gone has nobody left to end it.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._signals = Signals(is_driver=rank == 0, is_busy=self._is_busy)
        self._thread = threading.Thread(target=self._run, name="mnemosyne-watchdog", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    @contextmanager
    def watch(
        self, name: str, *, limit_s: float = math.inf, is_fatal: bool = True
    ) -> Iterator[None]:
        """Watch the body: it must end in time, and if it raises, all ranks end.

        On rank 0 a Ctrl-C is kept until the end of the body, because a step that is cut short
        leaves the ranks out of step; a second one ends the process.

        Args:
            name: as errors say it, "step 37".
            limit_s: seconds that it may take.
            is_fatal: False: exceptions pass, and Ctrl-C ends it at once. Whoever catches an
                exception then closes the watchdog with it.
        """
        outer = self._task
        self._task = Task(name, threading.get_ident(), limit_s, is_fatal)
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            if is_fatal:
                self.fail(error)
            raise
        finally:
            self._task = outer
        if outer is None:
            self._signals.raise_kept()

    def watch_step(self, index: int, predicted_s: float) -> AbstractContextManager[None]:
        """Watch the body, one step, with the limit that goes with its predicted time."""
        return self.watch(f"step {index}", limit_s=step_limit(predicted_s, index))

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Keep one Ctrl-C, and SIGTERM for a while, out of the end that all ranks come to."""
        self._is_shielded = True
        try:
            yield
        finally:
            self._is_shielded = False

    def fail(self, error: BaseException) -> NoReturn:
        """End all ranks because of an exception on this one; or because of its cause elsewhere."""
        where = self._failed_at = whereabouts(self._task, broken_stack(error))
        kind = Kind.FAILED if where.collective is None else Kind.BROKEN
        if kind == Kind.FAILED:
            log.error("%s failed", self._label, exc_info=error)
        self._report(Trouble(self._rank, kind, _one_line(error), where))
        self._thread.join()
        raise error  # the watchdog was closed before

    def close(self, error: BaseException | None = None) -> None:
        """Leave properly; the others need this rank no longer, or are told why they lose it.

        Args:
            error: what ends this rank, if anything does.
        """
        self._goodbye = Left("" if error is None else _one_line(error))
        self._signals.wake()
        self._thread.join(JUDGE_S + FAREWELL_S)
        self._signals.close()
        atexit.unregister(self._at_exit)

    def _at_exit(self) -> None:
        self.close(getattr(sys, "last_value", None))  # set where an exception ends the program

    def _is_busy(self, thread: int) -> bool:
        """Return whether a thread must not be interrupted."""
        task = self._task
        is_in_task = task is not None and task.is_fatal and task.thread == thread
        return is_in_task or self._is_shielded

    def _report(self, trouble: Trouble) -> None:
        self._reports.append(trouble)
        self._signals.wake()

    # The rest runs in the watchdog's own thread.

    def _run(self) -> None:
        while True:
            words = list(self._links.receive([self._signals.reader], TICK_S))
            self._pauses.tick()
            for rank, word in words:
                self._hear(rank, word)
            self._check()
            if self._troubles:
                self._decide()
            elif self._goodbye is not None:
                self._links.send(self._goodbye)
                self._links.close()
                return

    def _hear(self, rank: int, word: Word | str) -> None:
        match word:
            case str():
                if rank not in self._left:
                    self._add(Trouble(rank, Kind.LOST, word))
            case Trouble():
                if word.kind == Kind.TOLD and self._signals.can_pass_on:
                    self._termination.ask(word)
                else:
                    self._add(word)
            case Ask():
                self._links.send(Answer(self._where()))
            case Answer():
                self._answers[rank] = word.where
            case Left():
                self._left[rank] = (time.monotonic(), word.error)
                self._answers.pop(rank, None)
            case Verdict():
                self._end(word.text)

    def _check(self) -> None:
        """Look for trouble of this rank's own."""
        while self._reports:
            self._add(self._reports.popleft())
        terminated, interrupts = self._signals.read()
        if terminated:
            self._hear_sigterm()
        self._end_in_turn()
        task, now_s = self._task, time.monotonic()
        is_busy = self._is_shielded or (task is not None and task.is_fatal)
        self._interrupts = self._interrupts + interrupts if is_busy else 0
        if self._interrupts > 1:
            self._end("interrupted twice", INTERRUPTED)
        if self._launcher not in (None, os.getppid()):
            self._launcher = None
            self._add(Trouble(self._rank, Kind.TOLD, "its launcher is gone", self._where()))
        if task is not None and not self._is_stuck and self._ran_s(task) > task.limit_s:
            self._is_stuck = True
            limit = f"the limit was {task.limit_s:.1f} s"
            self._add(Trouble(self._rank, Kind.STUCK, limit, self._where()))
        for rank, (left_s, error) in list(self._left.items()):
            if now_s - left_s > GRACE_S and (error or task is not None):
                self._left[rank] = (math.inf, error)
                self._add(Trouble(rank, Kind.LEFT, error))

    def _hear_sigterm(self) -> None:
        """Rank 0 ends as after Ctrl-C, if the program sees to that; a lost rank comes first."""
        trouble = Trouble(self._rank, Kind.TOLD, "SIGTERM", self._where())
        if self._signals.can_pass_on:
            self._termination.ask(trouble)
        elif self._rank > 0 and self._links.peers and not self._termination.trouble:
            self._termination.ask(trouble)  # rank 0 decides
            self._links.send(trouble)
        else:
            self._add(trouble)

    def _end_in_turn(self) -> None:
        """Have rank 0 finish; end all where it does not."""
        termination = self._termination
        if termination.trouble is None or self._troubles:
            return
        if self._signals.can_pass_on and termination.is_due(SETTLE_S):
            log.error("%s", judge([termination.trouble], {}, self._links.labels))
            self._signals.pass_on()
        if termination.is_overdue(TERM_S):
            self._add(termination.trouble)

    def _ran_s(self, task: Task) -> float:
        """How long a task has taken, less the time in which this whole process did not run."""
        return time.monotonic() - task.started_s - self._pauses.since(task.started_s)

    def _where(self) -> Whereabouts:
        task = self._task
        if self._failed_at is not None:
            return self._failed_at
        if task is None:
            return Whereabouts()
        where = whereabouts(task, live_stack(sys._current_frames().get(task.thread)))
        return replace(where, paused_s=self._pauses.since(task.started_s))

    def _add(self, trouble: Trouble) -> None:
        if not self._troubles:
            self._first_trouble_s = time.monotonic()
            if self._rank == 0:
                self._links.send(Ask())
        self._troubles.append(trouble)
        if self._rank > 0:
            self._links.send(trouble)

    def _decide(self) -> None:
        """Rank 0 judges; the others wait for it, unless it is rank 0 that is gone."""
        waited_s = time.monotonic() - self._first_trouble_s
        if self._rank == 0:
            has_cause = any(trouble.kind in CAUSES for trouble in self._troubles)
            is_due = waited_s > (SETTLE_S if has_cause else DOUBT_S)
        else:
            is_due = waited_s > JUDGE_S or not self._links.peers
        if not is_due:
            return
        told = all(trouble.kind == Kind.TOLD for trouble in self._troubles)
        paused_s = self._pauses.since(time.monotonic() - 2 * JUDGE_S)
        if paused_s > JUDGE_S:  # the ranks that are gone have given this one up
            self._troubles.append(Trouble(self._rank, Kind.PAUSED, f"{paused_s:.1f} s"))
        answers = {**self._answers, self._rank: self._where()}
        if self._rank > 0:
            answers = dict.fromkeys(self._links.peers)  # rank 0 would have judged
        text = judge(self._troubles, answers, self._links.labels)
        self._end(text, TERMINATED if told else FAILED)

    def _end(self, text: str, status: int = FAILED) -> NoReturn:
        """Say why, and end the process whatever its other threads are at."""
        if self._rank == 0:
            self._links.send(Verdict(text))
        farewell = threading.Thread(target=self._say_farewell, args=(text,), daemon=True)
        farewell.start()
        # It may need a lock that the thread of a stuck step holds.
        farewell.join(FAREWELL_S)
        os._exit(status)

    def _say_farewell(self, text: str) -> None:
        log.error("%s; %s was %s, and ends", text, self._label, self._where())
        if self.on_end is not None:
            self.on_end(text)
        sys.stdout.flush()
        sys.stderr.flush()


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:MAX_TEXT]}" if lines else type(error).__name__
