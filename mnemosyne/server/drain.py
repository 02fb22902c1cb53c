"""The end of a server: no longer ready, a grace, then no new requests, then none at all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from mnemosyne.server.service import Service

log = logging.getLogger(__name__)

POLL_S = 0.05


class Drain:
    """Ends a server's requests once, however often it is asked.

    Args:
        service: whose requests.
        on_drained: called at the end.
    """

    def __init__(self, service: Service, on_drained: Callable[[], None]) -> None:
        self._service, self._on_drained = service, on_drained
        self._running: asyncio.Task[dict[str, Any]] | None = None
        self.is_whole = True  # no request was cut off

    async def run(self) -> dict[str, Any]:
        """Drain, or wait for a drain that runs; return its result."""
        if self._running is None:
            self._running = asyncio.ensure_future(self._drain())
        return await asyncio.shield(self._running)

    async def _drain(self) -> dict[str, Any]:
        service, started_s = self._service, time.monotonic()
        service.gate.is_leaving = True
        timeout_s = float(service.config.shutdown_timeout)
        log.info(
            "draining: %d requests, about %.0f s of prefill, at most %.0f s in all",
            service.gate.num_taken,
            service.backend.status().backlog_s,
            float(service.config.grace or 0) + timeout_s,
        )
        await asyncio.sleep(float(service.config.grace or 0))
        service.gate.is_closed = True
        end_s = time.monotonic() + timeout_s
        while service.gate.num_taken and time.monotonic() < end_s:
            await asyncio.sleep(POLL_S)
        self.is_whole = not service.gate.num_taken
        left_s = max(0.0, end_s - time.monotonic())
        self.is_whole &= await service.backend.drain(left_s)
        seconds = time.monotonic() - started_s
        cut_off = "" if self.is_whole else "; some requests were cut off"
        log.info("drained in %.1f s%s", seconds, cut_off)
        # behind the answer to the client that asked
        asyncio.get_running_loop().call_later(POLL_S, self._on_drained)
        return {"drained": self.is_whole, "seconds": round(seconds, 3)}
