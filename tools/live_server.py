"""A server over a small model, on a real socket, in this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import uvicorn

from mnemosyne.config_serve import HttpConfig
from mnemosyne.serve.engine import Engine
from mnemosyne.server.app import create_app
from mnemosyne.server.backend import Backend
from mnemosyne.server.service import Service

READY_S = 30.0


@dataclass(slots=True)
class Live:
    """A server that runs."""

    port: int
    service: Service
    loop: asyncio.AbstractEventLoop

    def num_tasks(self) -> int:
        """Tasks on the server's loop."""
        return len(asyncio.all_tasks(self.loop))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(backend: Engine | Backend, **config: object) -> Iterator[Live]:
    """Serve while this lasts.

    Args:
        backend: an idle engine, or what stands for one.
        config: fields of ``HttpConfig``.
    """
    app = create_app(backend, HttpConfig(**config))  # type: ignore[arg-type]
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1, http="h11")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
            assert thread.is_alive(), "the server ended at its start"
        port = server.servers[0].sockets[0].getsockname()[1]
        live = Live(port, app.state.service, app.state.service.loop)
        with httpx.Client(base_url=live.url, timeout=READY_S) as client:
            while client.get("/ready").status_code != 200:
                thread.join(0.01)
        yield live
    finally:
        server.should_exit = True
        thread.join(READY_S)
