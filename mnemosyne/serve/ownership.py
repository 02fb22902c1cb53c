"""The use of an engine: one user at a time, by name, in the process that made the engine."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident


@dataclass(slots=True, eq=False)
class Claim:
    """The use of an engine by one call or object, until it gives it back.

    Args:
        name: what uses it, such as "LLM.generate".
        ends_alone: it ends by itself, so that others may wait for it.
        remedy: what ends it where it does not.
        thread: that acts for it; another one may come to do so, as a stream may be read by several.
    """

    name: str
    ends_alone: bool
    remedy: str
    thread: int
    is_revoked: bool = False

    def act(self) -> None:
        """Let the calling thread act for the claim from here on."""
        self.thread = get_ident()

    def check(self) -> None:
        """Refuse to go on once the engine was taken away.

        Raises:
            ValueError: if it was.
        """
        if self.is_revoked:
            raise ValueError(f"{self.name} must have an open LLM, got one that was closed; {OPEN}")


OPEN = "close it when nothing runs"


class Ownership:
    """Lets one user at a time have an engine.

    Calls that end by themselves are served one after another, in the order in which they get the
    lock. Whatever would have to wait for a user that may never end is refused, by its name. While
    nobody has a claim, any thread may call the engine, but not two at the same moment.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()  # guards the claim
        self._claim: Claim | None = None
        self._in_use = threading.RLock()  # held for each call of the engine

    @property
    def is_here(self) -> bool:
        """Return whether this is the process that made the engine."""
        return os.getpid() == self._pid

    def check_process(self) -> None:
        """Refuse a process that was forked from the one that made the engine.

        Raises:
            ValueError: there; its threads, and those of the libraries below, are gone.
        """
        if not self.is_here:
            raise ValueError(
                f"LLM must be used in the process that made it, {self._pid}, got {os.getpid()}, a "
                "fork of it; start the process by multiprocessing's spawn and make the LLM there"
            )

    @contextmanager
    def claim(
        self, name: str, *, ends_alone: bool, remedy: str, waits: bool = True
    ) -> Iterator[Claim]:
        """Have the engine for the body, after a user that will soon be done with it.

        Args:
            name: what wants it.
            ends_alone: whether others may wait until the body is done.
            remedy: what ends this use; told to those who are refused meanwhile.
            waits: whether to wait at all.

        Raises:
            ValueError: naming the user that has it, where waiting is no use.
        """
        self.check_process()  # before any lock: another thread may have held it in a fork
        own = Claim(name, ends_alone, remedy, get_ident())
        with self._changed:
            while self._claim is not None:
                holder = self._claim
                if not (waits and holder.ends_alone) or holder.thread == own.thread:
                    raise _busy(name, holder)
                self._changed.wait()
            if not self._in_use.acquire(blocking=False):
                raise ValueError(
                    f"{name} must have an idle engine, got one in a step; {ONE_THREAD}"
                )
            self._in_use.release()
            self._claim = own
        try:
            yield own
        finally:
            self._release(own)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Call the engine in the body, as the user that has it or while it has none.

        Raises:
            ValueError: naming the user that has it, if it is another one.
        """
        self.check_process()
        holder = self._claim
        if holder is not None and holder.thread != get_ident():
            raise _busy(name, holder)
        if not self._in_use.acquire(blocking=False):
            raise ValueError(f"{name} must have an idle engine, got one in a step; {ONE_THREAD}")
        try:
            yield
        finally:
            self._in_use.release()

    @contextmanager
    def take(self, name: str) -> Iterator[None]:
        """Take the engine away from its user, to close it in the body.

        A call that ends by itself is waited for; the others find their claim revoked.
        """
        self.check_process()
        with self._changed:
            while self._claim is not None and self._claim.ends_alone:
                if self._claim.thread == get_ident():
                    break
                self._changed.wait()
            if self._claim is not None:
                self._claim.is_revoked = True
            own = self._claim = Claim(name, True, "wait", get_ident())
        with self._in_use:
            try:
                yield
            finally:
                self._release(own)

    def _release(self, claim: Claim) -> None:
        if not self.is_here:  # a fork, where the lock may be held for ever
            return
        with self._changed:
            if self._claim is claim:
                self._claim = None
                self._changed.notify_all()


ONE_THREAD = "call it from one thread, or use AsyncEngine"


def _busy(name: str, holder: Claim) -> ValueError:
    return ValueError(
        f"{name} must have an engine that nobody uses, got one that {holder.name} uses; "
        f"{holder.remedy}"
    )
