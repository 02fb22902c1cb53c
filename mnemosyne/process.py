"""A command as a process among others: signals that end it, and streams that are closed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # exit statuses
TERMINATED = 128 + signal.SIGTERM
UNREAD = 128 + signal.SIGPIPE  # nothing reads standard output any more
DESCRIPTORS = {"stdin": 0, "stdout": 1, "stderr": 2}


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread: it ends what Ctrl-C ends, and finished work stays."""


class Termination:
    """Return whether SIGTERM came while ``terminable`` lasted."""

    def __init__(self) -> None:
        self.came = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise at the first one; those that follow find the process ending already."""
        if not self.came:
            self.came = True
            raise Terminated


@contextmanager
def terminable() -> Iterator[Termination]:
    """Have SIGTERM raise ``Terminated`` while this lasts.

    Not in a rank of a mesh, which may be in a collective, where Python does not hear of it: there
    the watchdog takes it once there is one, and it ends the process before.
    """
    termination = Termination()
    handlers = {} if "RANK" in os.environ else {signal.SIGTERM: termination.handle}
    with _handling(handlers):
        yield termination


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Let nothing but Ctrl-C come between, while finished work is written down."""
    with _handling({signal.SIGTERM: signal.SIG_IGN}):
        yield


@contextmanager
def ended_at_once() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM end the process without a word, while modules are imported.

    Nothing is there to be saved yet, and some modules take an exception that comes in the middle
    of their import for a fault of their own.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    with _handling({signal.SIGINT: end, signal.SIGTERM: end}):
        yield


class KeptBack:
    """Ctrl-C and SIGTERM that wait until the code in between can be interrupted."""

    def __init__(self) -> None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._usual = {number: usual for number, usual in handlers.items() if callable(usual)}
        self._came: list[int] = []
        self._process = os.getpid()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Note signals while this lasts, and deliver them afterwards."""
        with _handling(dict.fromkeys(self._usual, self._note)):
            yield
        self._let_go()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Deliver the signals that came before, and at once those that come while this lasts.

        In another process nothing is held: its signals are the business of its parent.
        """
        with _handling(self._usual if os.getpid() == self._process else {}):
            self._let_go()
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append(number)

    def _let_go(self) -> None:
        while self._came:
            number = signal.Signals(self._came.pop(0))
            self._usual[number](number, None)


def end_quietly(status: int) -> None:
    """Have Ctrl-C end the process at once from here on: all is done but the interpreter's exit."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(status)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, end)


def open_streams() -> None:
    """Have standard output and error go nowhere where the caller has closed them.

    Their descriptors are taken too: the next file to be opened would get them, and with it whatever
    a library prints. Standard input stays closed, so that who reads from it can say so. Characters
    that standard output has no code for are written as escapes.
    """
    for name, descriptor in DESCRIPTORS.items():
        stream = getattr(sys, name)
        if stream is None:
            with suppress(OSError):
                while os.open(os.devnull, os.O_RDWR) < descriptor:
                    pass
            if name != "stdin":  # its reader gets an error that says it is closed
                setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print on standard error, unless nobody reads it."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def flush_output() -> None:
    """Hand over what was printed, while somebody can still be told that it cannot be.

    Raises:
        OSError: if it cannot be; what is left is dropped, and the interpreter does not try again.
    """
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Let the rest of standard output go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def _handling(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Take signals while this lasts; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
