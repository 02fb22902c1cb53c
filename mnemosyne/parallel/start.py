"""A rank while it starts, before there is a watchdog: signals end it, and so does its launcher."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mnemosyne.process import Termination

UNWIND_S = 3.0  # for the main thread to end by itself after a signal
FAREWELL_S = 12.0  # for a watchdog to say that the launcher is gone, where there is one
TICK_S = 0.5
FAILED = 1  # exit status


@contextmanager
def started_rank(rank: int) -> Iterator[Termination]:
    """Guard a rank while the body runs; in the main thread, before torch is imported.

    A thread hears signals while the main thread waits for other ranks in C++, and ends the process
    if the main thread has not. Once the watchdog is there, it hears them in place of this.

    Args:
        rank: this one; on rank 0 SIGTERM raises ``Terminated``, on the others it ends the process.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    is_over = threading.Event()
    on_term = signal.signal(signal.SIGTERM, termination.handle) if rank == 0 else None
    wakeup_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reader, is_over), daemon=True)
    thread.start()
    try:
        yield termination
    finally:
        is_over.set()
        signal.set_wakeup_fd(wakeup_fd)
        if rank == 0:
            signal.signal(signal.SIGTERM, on_term)
        writer.close()
        thread.join()
        reader.close()


def _watch(reader: socket.socket, is_over: threading.Event) -> None:
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    if launcher is not None and not _has_store():
        _end("its launcher is gone", FAILED)
    reader.settimeout(TICK_S)
    while not is_over.is_set():
        with suppress(TimeoutError):
            numbers = [n for n in reader.recv(64) if n in (signal.SIGTERM, signal.SIGINT)]
            if numbers and not is_over.wait(UNWIND_S):
                _end(f"{signal.Signals(numbers[0]).name} while it started", 128 + numbers[0])
        if launcher is not None and os.getppid() != launcher and not is_over.wait(FAREWELL_S):
            _end("its launcher is gone", FAILED)


def _has_store() -> bool:
    """Return whether torchrun, which serves its ranks their store, is still there.

    It may have been killed before this process could look up its parent.
    """
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_served or os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return True
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.create_connection(place, timeout=TICK_S).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True


def _end(why: str, status: int) -> None:
    with suppress(OSError):
        os.write(2, f"rank {os.environ.get('RANK')} ends: {why}\n".encode())
    os._exit(status)
