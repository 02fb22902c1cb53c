"""Engines for a front in the test's own process: as real as ranks, and there at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from mnemosyne.llm import LLM
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.server.engine_end import EngineEnd
from mnemosyne.server.link import Link
from mnemosyne.server.remote import RemoteBackend
from tests.server.fronts import running_front
from tests.server.telling import TellingBackend


@dataclass(slots=True, eq=False)
class InProcessEngine:
    """An engine that dies when it is killed or fails."""

    link: Link
    serving: asyncio.Task[bool]
    exit_status: int | None = None

    def kill(self) -> None:
        """As SIGKILL does: what was not sent is lost."""
        self.serving.cancel()


class InProcessRanks:
    """Engines one after the other over one model; a ``Source``."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.running: InProcessEngine | None = None
        self.num_started = 0

    @asynccontextmanager
    async def engine(self) -> AsyncIterator[InProcessEngine]:
        ours, theirs = socket.socketpair()
        link, other = await Link.over(ours), await Link.over(theirs)
        engine = InProcessEngine(link, asyncio.create_task(self._serve(other)))
        self.running, self.num_started = engine, self.num_started + 1
        try:
            yield engine
        finally:
            link.close()
            with suppress(asyncio.CancelledError, RuntimeError):
                await engine.serving
            engine.exit_status = 0

    async def _serve(self, link: Link) -> bool:
        self._llm.clear_cache()  # as that of a process that is new
        try:
            async with AsyncEngine(self._llm.engine) as engine:
                return await EngineEnd(engine, TellingBackend(engine), link).serve()
        finally:
            link.abort()


@asynccontextmanager
async def front_of(
    llm: LLM, **options: bool
) -> AsyncIterator[tuple[RemoteBackend, InProcessRanks]]:
    """A front over engines of this process, ended in good order."""
    source = InProcessRanks(llm)
    async with running_front(source, **options) as backend:
        yield backend, source
