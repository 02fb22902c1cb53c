"""Signals to a rank whose main thread may be in a collective, where Python does not hear them."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

ONE_PRESS_S = 0.5  # within which what comes again is the same Ctrl-C


class Signals:
    """SIGTERM and Ctrl-C, for the thread that watches.

    SIGTERM is kept from ending the process at once, so that the watcher can say why. On rank 0,
    where the program handles SIGTERM itself, the watcher passes it on once it knows that no other
    rank is lost. Ctrl-C is a matter of rank 0, which tells the others. Both wait there for the end
    of what must not be cut short. A Ctrl-C may reach rank 0 both from a launcher and from whoever
    told the launcher: what comes again within half a second is the same one.

    Handlers are set where this runs in the main thread of the process, which Python asks for.

    Args:
        is_driver: whether this is rank 0.
        is_busy: whether a thread, by its identifier, must not be interrupted.
    """

    def __init__(self, *, is_driver: bool, is_busy: Callable[[int], bool]) -> None:
        self.reader, self._writer = socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._is_driver = is_driver
        self._is_busy = is_busy
        self._kept = 0  # Ctrl-C that came in a busy time
        self._read_s = self._heard_s = -ONE_PRESS_S  # last Ctrl-C of the watcher, of the handler
        self._passes_on = False  # whether SIGTERM is the program's now
        self._is_kept_back = False  # a SIGTERM that is the program's, in a busy time
        self._has_handlers = threading.current_thread() is threading.main_thread()
        if self._has_handlers:
            self._wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._on_term = signal.signal(signal.SIGTERM, self._terminate)
            self._on_int = signal.signal(signal.SIGINT, self._interrupt)

    @property
    def can_pass_on(self) -> bool:
        """Return whether the program of rank 0 wants to hear of SIGTERM."""
        return self._is_driver and self._has_handlers and callable(self._on_term)

    def pass_on(self) -> None:
        """Raise in the main thread what the program raises at SIGTERM."""
        self._passes_on = True
        main = threading.main_thread().ident
        assert main is not None, "it runs"
        signal.pthread_kill(main, signal.SIGTERM)  # wakes it up if it waits

    def wake(self) -> None:
        """Wake the thread that waits for ``reader``."""
        with suppress(OSError):  # it has enough to wake up for, or is gone
            self._writer.send(b"\0")

    def read(self) -> tuple[bool, int]:
        """Signals since the last call: whether a SIGTERM, and how many times Ctrl-C."""
        try:
            received = self.reader.recv(4096)
        except BlockingIOError:
            received = b""
        is_interrupt, now_s = self._is_driver and signal.SIGINT in received, time.monotonic()
        is_new = is_interrupt and now_s - self._read_s >= ONE_PRESS_S
        self._read_s = now_s if is_new else self._read_s
        return signal.SIGTERM in received, int(is_new)

    def raise_kept(self) -> None:
        """Raise the KeyboardInterrupt that was kept back, if one was; or pass SIGTERM on."""
        if self._is_kept_back:
            self._is_kept_back = False
            self._terminate(signal.SIGTERM, None)
        if self._kept:
            self._kept = 0
            raise KeyboardInterrupt

    def close(self) -> None:
        """Restore the previous handlers."""
        if self._has_handlers:
            try:
                signal.set_wakeup_fd(self._wakeup_fd)
            except (OSError, ValueError):  # at the exit: its owner has closed it
                signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, self._on_term)
            signal.signal(signal.SIGINT, self._on_int)
        self.reader.close()
        self._writer.close()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """The bare existence of a handler makes Python write the signal to the socket."""
        if not self._passes_on:
            return
        if self._is_busy(threading.get_ident()):
            self._is_kept_back = True
        elif callable(self._on_term):
            self._on_term(number, frame)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self._is_driver or now_s - self._heard_s < ONE_PRESS_S:
            return
        self._heard_s = now_s
        if self._is_busy(threading.get_ident()):
            self._kept += 1
            return
        raise KeyboardInterrupt
