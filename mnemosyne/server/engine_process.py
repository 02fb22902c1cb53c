"""The process of rank 0 behind a front: its model, the event loop of the link, and signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from mnemosyne.process import INTERRUPTED, TERMINATED
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.serve.engine import Engine
from mnemosyne.server.backend import Backend
from mnemosyne.server.engine_end import EngineEnd
from mnemosyne.server.link import INHERITED, Link, connect, frame, inherited
from mnemosyne.server.stages import stage_of
from mnemosyne.server.words import Leaving, Loading, encode

log = logging.getLogger(__name__)

SEEK_S = 0.5  # between two looks for a front
SETTLE_S = 2.0  # after SIGTERM
TELL_S = 0.25  # between two words on how far the start is


class Connection:
    """This process's way to its front.

    Args:
        address: ``fd:N``, a socket that the front has passed on, or the front's name.
    """

    def __init__(self, address: str) -> None:
        self._name = "" if address.startswith(INHERITED) else address
        self._socket: socket.socket | None = None
        self._told_s = 0.0
        if not self._name:
            self._socket = inherited(int(address.removeprefix(INHERITED)))

    @property
    def is_only_one(self) -> bool:
        """Tell if there is no other once this front is gone."""
        return not self._name

    def tell_progress(self, what: str, num_done: int, num_total: int) -> None:
        """Report the progress of the start now and then, without waiting for a missing front."""
        now_s = time.monotonic()
        if self._socket is None or (now_s - self._told_s < TELL_S and num_done < num_total):
            return
        self._told_s = now_s
        with suppress(OSError):  # it is gone: the main loop will see
            self._socket.sendall(frame(encode(Loading(stage_of(what, num_done, num_total)))))

    async def link(self) -> Link:
        """The link to the front; waits for one that has the name."""
        while self._socket is None:
            self._socket = connect(self._name)
            if self._socket is None:
                await asyncio.sleep(SEEK_S)
        found, self._socket = self._socket, None
        return await Link.over(found)


class EngineProcess:
    """Runs an engine for fronts until one of them says that it is over.

    Its event loop has a thread of its own, so that the main thread is free for signals. Where
    others have started the ranks, SIGTERM goes to the front, which lets running requests finish;
    the watchdog of a mesh would not wait.

    Args:
        engine: idle; of rank 0.
        backend: makes what tells of the engine.
        connection: to the front.
    """

    def __init__(
        self, engine: Engine, backend: Callable[[AsyncEngine], Backend], connection: Connection
    ) -> None:
        self._engine = engine
        self._backend = backend
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._error: BaseException | None = None

    def run(self) -> int:
        """Do so, in the main thread.

        Returns:
            The exit status: 0 once a front said that it is over, 130 after Ctrl-C, 143 after a
            SIGTERM that ended it.

        Raises:
            RuntimeError: if the engine failed.
        """
        thread = threading.Thread(target=self._run, name="mnemosyne-link", daemon=True)
        heard: list[int] = []

        def hear(number: int, frame: FrameType | None) -> None:
            heard.append(number)
            waits = number == signal.SIGTERM and not self._connection.is_only_one
            self._post(self._leave_soon if waits else self._stop)

        with _signals(hear):
            thread.start()
            thread.join()
        if self._error is not None:
            raise RuntimeError(str(self._error)) from self._error
        if self._connection.is_only_one and signal.SIGTERM in heard:
            return TERMINATED
        return INTERRUPTED if signal.SIGINT in heard else 0

    def _post(self, call: Callable[[], None]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # it is over already
                self._loop.call_soon_threadsafe(call)

    def _leave_soon(self) -> None:
        """Wait a moment: launchers send SIGTERM as well when another rank is lost, whose watchdog
        then ends this process, and another one takes its place.
        """
        assert self._loop is not None, "it runs in it"
        self._loop.call_later(SETTLE_S, self._leave)

    def _leave(self) -> None:
        """This process got a signal to end: the front is to drain first, if there is one."""
        if self._link is None:
            self._stop()
        else:
            self._link.put(encode(Leaving("SIGTERM")))

    def _stop(self) -> None:
        if self._main is not None:
            self._main.cancel()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            pass
        except Exception as error:  # noqa: BLE001  # the main thread raises it
            self._error = error

    def _tokenizer_files(self) -> dict[str, bytes]:
        """Of a tokenizer that comes of no folder, which the front's readers could open."""
        tokenizer = self._engine.intake.tokenizer
        if tokenizer is None or tokenizer.folder is not None:
            return {}
        with tempfile.TemporaryDirectory(prefix="mnemosyne-") as folder:
            tokenizer.save(Path(folder))
            return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    async def _serve(self) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        async with AsyncEngine(self._engine) as engine:
            backend, files = self._backend(engine), self._tokenizer_files()
            while True:
                link = self._link = await self._connection.link()
                try:
                    is_told = await EngineEnd(engine, backend, link, files).serve()
                finally:
                    self._link = None
                    link.close()
                if is_told or self._connection.is_only_one:
                    return
                log.warning("the front is gone; waiting for another one")


@contextmanager
def _signals(hear: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Take SIGTERM and Ctrl-C from their handlers; in the main thread."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    wakeup_fd = signal.set_wakeup_fd(-1)
    before = {number: signal.signal(number, hear) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
