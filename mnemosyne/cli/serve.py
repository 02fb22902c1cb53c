"""``mnemosyne serve``: an engine behind OpenAI's API."""

from __future__ import annotations

import asyncio
import logging

from mnemosyne.config_serve import ServeConfig
from mnemosyne.llm import LLM
from mnemosyne.server.embedded import EmbeddedBackend
from mnemosyne.server.json_log import JsonFormatter
from mnemosyne.server.run import HttpServer


def serve(config: ServeConfig) -> int:
    """Serve until a drain.

    Args:
        config: an engine, and where to serve it.

    Returns:
        The exit status: 0 if no request was cut off.

    Raises:
        ValueError: if something in the config cannot be used.
    """
    if config.serve.log_json:
        for handler in logging.getLogger("mnemosyne").handlers:
            handler.setFormatter(JsonFormatter())
    return asyncio.run(_serve(config))


async def _serve(config: ServeConfig) -> int:
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

    def read(num_done: int, num_bytes: int) -> None:
        backend.tell_stage(f"loading weights: {num_done / 1e6:,.0f} of {num_bytes / 1e6:,.0f} MB")

    def compile_(num_done: int, num_sizes: int) -> None:
        backend.tell_stage(f"compiling: {num_done} of {num_sizes} sizes")

    llm = await asyncio.to_thread(LLM.from_config, config, progress=read, compiling=compile_)
    backend.tell_stage("measuring step times")
    await backend.attach(llm.engine)
    return llm
