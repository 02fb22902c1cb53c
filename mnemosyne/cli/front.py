"""``mnemosyne serve`` outside the ranks: HTTP here, the engine in processes that may come and go.

Heavy modules are imported once the ranks are starting, which takes them longer.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mnemosyne.config_serve import ServeConfig
from mnemosyne.process import sigterm_ignored
from mnemosyne.server.json_log import log_json
from mnemosyne.server.remote import RemoteBackend
from mnemosyne.server.sources import AttachedRanks, EngineEndedError, Source, StartedRanks

if TYPE_CHECKING:
    from mnemosyne.server.run import HttpServer

log = logging.getLogger(__name__)


def front(config: ServeConfig, command: Callable[[], Sequence[str]]) -> int:
    """Serve until a drain.

    Args:
        config: an engine, and where to serve it.
        command: gives program and arguments that do in a rank what this process is asked to.

    Returns:
        The exit status: 0 if no request was cut off; that of the ranks if they cannot be started.

    Raises:
        ValueError: if something in the config cannot be used.
    """
    if config.serve.log_json:
        log_json()
    if config.serve.link is not None:
        source: Source = AttachedRanks(config.serve.link)
        log.info("ranks come by serve.link=%s", config.serve.link)
    else:
        words = list(command())
        size = config.mesh.world_size
        source = StartedRanks(lambda address: [*words, f"serve.link={address}"], size)
    return asyncio.run(_Front(config, source).run())


class _Front:
    """The server and its engine, side by side.

    Args:
        config: an engine, and where to serve it.
        source: where engines come from.
    """

    def __init__(self, config: ServeConfig, source: Source) -> None:
        self._config = config
        self._source = source
        self._server: HttpServer | None = None

    async def run(self) -> int:
        """Serve until a drain or until there is no engine."""
        backend = RemoteBackend(
            self._source, resume=self._config.serve.resume, on_leaving=self._leave
        )
        running = asyncio.create_task(backend.run())
        try:
            await asyncio.sleep(0)  # the ranks are started
            return await self._serve(backend, running)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _serve(self, backend: RemoteBackend, running: asyncio.Task[None]) -> int:
        from mnemosyne.server.run import HttpServer

        server = self._server = HttpServer(backend, self._config.serve)
        serving = asyncio.create_task(server.run())
        settling = asyncio.create_task(_settle(backend))
        await asyncio.wait({serving, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            server.stop()
        status = await serving
        settling.cancel()
        with sigterm_ignored():  # it is ending
            await backend.close()
            try:
                await running
            except EngineEndedError as error:
                log.error("%s", error)
                return error.exit_status
        return status

    def _leave(self, reason: str) -> None:
        """Somebody told the ranks to end: have running requests finish first."""
        log.info("ranks: %s: running requests finish, new ones are refused", reason)
        if self._server is not None:
            self._server.begin_drain()


async def _settle(backend: RemoteBackend) -> None:
    """Leave what is there once the model is known out of the search for garbage.

    It is modules, and a search through all of them would hold the loop for 80 ms.
    """
    await backend.about()
    gc.collect()
    gc.freeze()
