"""``mnemosyne serve`` on rank 0: the engine of a front, or HTTP beside it where there is none."""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial

from mnemosyne.config_serve import HttpConfig, ServeConfig
from mnemosyne.llm import LLM
from mnemosyne.server.embedded import EmbeddedBackend
from mnemosyne.server.engine_process import Connection, EngineProcess
from mnemosyne.server.json_log import log_json
from mnemosyne.server.stages import COMPILING, LOADING, stage_of

log = logging.getLogger(__name__)

ELASTIC_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # seconds; torchrun's own variable
ELASTIC_S = 30.0  # what torchrun does without it


def serve(config: ServeConfig) -> int:
    """Serve until a front says that it is over, or without one until a drain.

    Args:
        config: an engine, and where to serve it.

    Returns:
        The exit status: 0 if no request was cut off.

    Raises:
        ValueError: if something in the config cannot be used.
    """
    link = config.serve.link
    connection = None if link is None else Connection(link)
    if connection is None or not connection.is_only_one:
        warn_of_torchrun(config.serve)
    if config.serve.log_json:
        log_json()
    if connection is not None:
        return _serve_front(config, connection)
    log.warning(
        "streams end with this process: rank 0 serves HTTP itself under torchrun; see "
        "docs/deploy.md for a server whose streams outlive the ranks"
    )
    return asyncio.run(_serve(config))


def warn_of_torchrun(config: HttpConfig) -> None:
    """Warn of what torchrun would cut off: by default it kills ranks 30 s after SIGTERM."""
    needed_s = float(config.grace or 0) + float(config.shutdown_timeout)
    given_s = float(os.environ.get(ELASTIC_TIMEOUT, ELASTIC_S))
    if given_s < needed_s:
        log.warning(
            "torchrun kills ranks %.0f s after SIGTERM as far as known here, a drain may take "
            "%.0f s; set %s=%.0f, or drain with `mnemosyne drain URL` before the signal",
            given_s,
            needed_s,
            ELASTIC_TIMEOUT,
            needed_s + 30,
        )


def _serve_front(config: ServeConfig, connection: Connection) -> int:
    """Run the engine of a front."""
    with LLM.from_config(
        config,
        progress=partial(connection.tell_progress, LOADING),
        compiling=partial(connection.tell_progress, COMPILING),
    ) as llm:
        return EngineProcess(
            llm.engine,
            lambda entered: EmbeddedBackend(llm.engine, entered, saves_tokenizer=False),
            connection,
        ).run()


async def _serve(config: ServeConfig) -> int:
    from mnemosyne.server.run import HttpServer

    backend = EmbeddedBackend()
    server = HttpServer(backend, config.serve)
    serving = asyncio.create_task(server.run())
    loading = asyncio.create_task(_load(backend, config))
    async with backend:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and loading.exception() is not None:
            server.stop()
        status = await serving
    llm = await loading
    llm.close()
    return status


async def _load(backend: EmbeddedBackend, config: ServeConfig) -> LLM:
    """Read the model in a thread, while ``/health`` and ``/ready`` answer."""

    def tell(what: str, num_done: int, num_total: int) -> None:
        backend.tell_stage(stage_of(what, num_done, num_total))

    llm = await asyncio.to_thread(
        LLM.from_config,
        config,
        progress=partial(tell, LOADING),
        compiling=partial(tell, COMPILING),
    )
    await backend.attach(llm.engine)
    return llm
