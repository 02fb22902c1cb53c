"""Middleware before every route: a name for each request, errors as JSON, one line in the log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from mnemosyne.server.errors import FAILED, ApiError

access = logging.getLogger("mnemosyne.server.access")
log = logging.getLogger(__name__)

NAME = re.compile(rb"[\w.:@=+/-]{1,128}")  # of requests, as clients may give it


class Door:
    """Middleware around the whole app.

    Args:
        app: what stands behind it.
        count: is told route and status of every response.
        logs: whether to write a line for each; never what was asked.
    """

    def __init__(self, app: Any, *, count: Callable[[str, int], None], logs: bool) -> None:
        self._app, self._count, self._logs = app, count, logs

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; others than of HTTP pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        name = given.decode() if NAME.fullmatch(given) else secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"] = name
        state["send"] = send  # for parts of a stream: middleware looks at its start alone
        started_s, statuses = time.monotonic(), []

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            log.exception("%s failed", name)
            if statuses:
                raise  # the connection is closed in the middle: all that is left to say
            await _respond(ApiError(500, "the server failed; see its log", kind=FAILED), named)
        status = statuses[0] if statuses else 499
        # a route's template, not what a client wrote: labels stay few
        self._count(getattr(scope.get("route"), "path", "none"), status)
        if self._logs:
            ms = 1000 * (time.monotonic() - started_s)
            note = " ".join(f"{key}={value}" for key, value in state.get("note", {}).items())
            line = "%s %s %s %d %.0f ms %s"
            path = scope["path"].encode("unicode_escape").decode()[:200]
            access.info(line, name, scope["method"], path, status, ms, note)


async def _respond(error: ApiError, send: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    headers += [(k.lower().encode(), v.encode()) for k, v in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.body()})
