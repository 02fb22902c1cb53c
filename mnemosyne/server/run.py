"""The HTTP server as a part of a program: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn

from mnemosyne.config_serve import HttpConfig
from mnemosyne.server.app import create_app
from mnemosyne.server.backend import Backend

log = logging.getLogger(__name__)

BACKLOG = 2048  # connections that the kernel holds
CLOSE_S = 5  # for the last bytes to reach their clients
LOST, DRAINED = 1, 0  # exit statuses


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """An app on a socket, from the first byte to a drain.

    Args:
        backend: serves the jobs; may be loading.
        config: where to listen, and limits.

    Raises:
        ValueError: if the address cannot be listened on, or a file cannot be used.
    """

    def __init__(self, backend: Backend, config: HttpConfig) -> None:
        self._backend, self._config = backend, config
        self.app = create_app(backend, config, on_drained=self.stop)
        self._socket = listen(config)
        self._server = _Server(
            uvicorn.Config(
                self.app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=CLOSE_S,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                lifespan="on",
            )
        )
        self._is_whole = True
        self._drains: set[asyncio.Task[dict[str, Any]]] = set()

    @property
    def url(self) -> str:
        """Of its root."""
        host, port = self._socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        return f"http{'s' if self._config.tls_cert else ''}://{shown}:{port}"

    async def run(self) -> int:
        """Serve until a drain, by SIGTERM, Ctrl-C or a request, or ``stop``.

        Returns:
            The exit status: 0 if no request was cut off.
        """
        # its lines about clients that leave are in our own log
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        announcing = asyncio.create_task(self._announce())
        with _signals(self._on_signal):
            try:
                await self._server.serve(sockets=[self._socket])
            finally:
                announcing.cancel()
                self._socket.close()
        is_whole = self._is_whole and self.app.state.drain.is_whole
        return DRAINED if is_whole else LOST

    def stop(self) -> None:
        """End now; running requests are cut off."""
        self._is_whole &= not self.app.state.service.gate.num_taken
        self._server.should_exit = True

    def begin_drain(self) -> None:
        """Let running requests finish, then end."""
        task = asyncio.get_running_loop().create_task(self.app.state.drain.run())
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._drains and number == signal.SIGINT:
            self.stop()  # pressed twice
        elif not self._drains:
            log.info("%s: running requests finish, new ones are refused", number.name)
            self.begin_drain()

    async def _announce(self) -> None:
        """Log the address, and the lengths that fit once they are known."""
        log.info("listening at %s; not ready yet", self.url)
        about = await self._backend.about()
        gate = self.app.state.service.gate
        while not gate.is_ready:
            await asyncio.sleep(0.02)
        fits = min(about.max_model_len, about.max_request_tokens)
        log.info(
            "serving %s at %s/v1: prompt and answer of up to %s tokens fit",
            gate.names[0],
            self.url,
            f"{fits:,}",
        )
        log.info("try: %s", curl_line(self.url, about.tokenizer_dir is not None, gate.keys.is_open))


def curl_line(url: str, has_text: bool, is_open: bool) -> str:
    """A request to copy."""
    body: dict[str, Any] = {"prompt": "Once" if has_text else [1, 2, 3], "max_tokens": 16}
    key = "" if is_open else "-H 'Authorization: Bearer KEY' "
    return f"curl {url}/v1/completions {key}-d '{json.dumps(body)}'"


def listen(config: HttpConfig) -> socket.socket:
    """A socket that listens where the config says.

    Raises:
        ValueError: if it cannot.
    """
    for name in ("tls_cert", "tls_key"):
        path = getattr(config, name)
        if path is not None and not Path(path).is_file():
            raise ValueError(f"serve.{name} must be a file, got {path!r}; name one in PEM format")
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise _no_address(config, error) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError, AttributeError):
            # accepted sockets inherit it: a client that reads nothing for this long is cut off
            limit_ms = round(1000 * float(config.write_timeout))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
        made.bind(address)
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise _no_address(config, error) from error
    return made


def _no_address(config: HttpConfig, error: OSError) -> ValueError:
    return ValueError(
        f"serve.host and serve.port must be free to listen on, got {config.host}:{config.port} "
        f"({error.strerror or error}); choose another one"
    )


@contextmanager
def _signals(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Take SIGTERM and Ctrl-C on this loop, where its thread can."""
    loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
    before = {}
    with suppress(ValueError, RuntimeError):  # not the main thread
        for number in numbers:
            before[number] = signal.getsignal(number)
            loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(ValueError):
                loop.remove_signal_handler(number)
                signal.signal(number, handler)
