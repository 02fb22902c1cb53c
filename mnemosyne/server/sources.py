"""The sources of a front's engines: ranks that it starts itself, or that others have started."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from mnemosyne.parallel.keys import user_of
from mnemosyne.parallel.launch import Ranks, started_ranks
from mnemosyne.server.link import INHERITED, Link, listen

log = logging.getLogger(__name__)

END_S = 60.0  # for ranks to end by themselves once the link is closed
HURRIED_S = 3.0  # the same when this process is ordered to end at once


class Engine(Protocol):
    """Ranks that run, or will soon."""

    link: Link

    def kill(self) -> None:
        """End all ranks at once."""
        ...

    @property
    def exit_status(self) -> int | None:
        """Of the ranks, once they have ended; None if others start them, and will again."""
        ...


class Source(Protocol):
    """A source of engines."""

    def engine(self) -> AbstractAsyncContextManager[Engine]:
        """Ranks, started here or by others; leaving waits until they have ended."""
        ...


class EngineEndedError(Exception):
    """There is no engine, and there will be none."""

    def __init__(self, text: str, exit_status: int) -> None:
        super().__init__(text)
        self.exit_status = exit_status


@dataclass(slots=True, eq=False)
class StartedEngine:
    """Ranks of this host that this process has started."""

    link: Link
    ranks: Ranks
    exit_status: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def kill(self) -> None:
        """End all ranks at once."""
        self.ranks.kill()


class StartedRanks:
    """Starts ranks on this host; a ``Source``. They end with this process, however it ends.

    Args:
        command: gives program and arguments of every rank, from the value of ``serve.link``.
        world_size: ranks to start.
    """

    def __init__(self, command: Callable[[str], Sequence[str]], world_size: int) -> None:
        self._command = command
        self._world_size = world_size

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[StartedEngine]:
        """Start the ranks; enter it in a thread that lives as long as they are to live."""
        ours, theirs = socket.socketpair()
        number = theirs.fileno()
        with (
            ours,
            theirs,
            started_ranks(
                self._command(f"{INHERITED}{number}"), self._world_size, inherited=[number]
            ) as ranks,
        ):
            theirs.close()
            engine = StartedEngine(await Link.over(ours), ranks)
            loop = asyncio.get_running_loop()

            def wait() -> None:
                engine.exit_status = ranks.wait()
                loop.call_soon_threadsafe(engine.ended.set)

            threading.Thread(target=wait, name="mnemosyne-ranks", daemon=True).start()
            try:
                yield engine
            except BaseException:
                await _leave(engine, HURRIED_S)
                raise
            await _leave(engine, END_S)


class AttachedRanks:
    """Waits for ranks that others start; a ``Source``.

    Args:
        name: that rank 0 is given as ``serve.link``.

    Raises:
        ValueError: if another server of this host has it.
    """

    def __init__(self, name: str) -> None:
        self._listener = listen(name)
        self._listener.setblocking(False)

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[AttachedEngine]:
        """Wait for rank 0; a second one that comes waits for the end of the first."""
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(self._listener)
            if user_of(connection) == os.geteuid():
                break
            log.error("a process of another user was turned away at serve.link")
            connection.close()
        engine = AttachedEngine(await Link.over(connection))
        try:
            yield engine
        finally:
            engine.link.close()

    def close(self) -> None:
        """Free the name."""
        self._listener.close()


@dataclass(slots=True, eq=False)
class AttachedEngine:
    """Ranks that this process has not started, and cannot end but by hanging up."""

    link: Link
    exit_status: int | None = None

    def kill(self) -> None:
        """Hang up: rank 0 drops all jobs, and comes back if it can."""
        self.link.abort()


async def _leave(engine: StartedEngine, limit_s: float) -> None:
    """Hang up, and wait until all ranks have ended; they are killed if they do not."""
    engine.link.close()
    try:
        await asyncio.wait_for(engine.ended.wait(), limit_s)
    except TimeoutError:
        log.error("ranks did not end within %.0f s and are killed", limit_s)
        engine.kill()
        await engine.ended.wait()
