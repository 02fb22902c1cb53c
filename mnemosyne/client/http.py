"""Requests over HTTP/1.1 whose answers are read as they come, event by event."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

MAX_LINE = 1 << 20  # bytes of an event
DONE = "[DONE]"


class NoAnswerError(Exception):
    """A request that failed: nothing listens, the connection broke, or the answer is an error."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Reply:
    """The answer of a server, whose body is still coming."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON of every server-sent event.

        Raises:
            NoAnswerError: if the stream ends before it says so, or an event is an error.
        """
        async for line in self._lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data == DONE:
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise NoAnswerError(str(event["error"].get("message", event["error"])))
                yield event
        raise NoAnswerError("the stream ended before its last event")

    async def text(self) -> str:
        """All of the body."""
        return "\n".join([line async for line in self._lines()])

    async def _lines(self) -> AsyncIterator[str]:
        rest = b""
        async for part in self._parts():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace").rstrip("\r")
        if rest:
            yield rest.decode(errors="replace")

    async def _parts(self) -> AsyncIterator[bytes]:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.reader.readline()).split(b";")[0] or b"0", 16):
                yield (await self.reader.readexactly(size + 2))[:-2]
        elif "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
        else:
            while part := await self.reader.read(MAX_LINE):
                yield part


@asynccontextmanager
async def asked(
    url: str, body: Mapping[str, Any] | None = None, *, key: str | None = None
) -> AsyncIterator[Reply]:
    """Send a request; leaving closes the connection, even if more is to come.

    Args:
        url: all of it.
        body: JSON to post; None: a GET.
        key: of the API.

    Raises:
        NoAnswerError: if nobody answers.
    """
    parts = urlsplit(url)
    is_safe = parts.scheme == "https"
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname,
            parts.port or (443 if is_safe else 80),
            ssl=ssl.create_default_context() if is_safe else None,
            limit=MAX_LINE,
        )
    except OSError as error:
        raise NoAnswerError(f"{url} does not answer: {error.strerror or error}") from error
    try:
        writer.write(_request(parts.netloc, parts.path or "/", body, key))
        await writer.drain()
        yield await _begun(reader)
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise NoAnswerError(f"{url} broke off: {error}") from error
    finally:
        writer.close()


def _request(host: str, path: str, body: Mapping[str, Any] | None, key: str | None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        f"Host: {host}",
        "Connection: close",
        "Accept: text/event-stream, application/json",
        f"Content-Length: {len(data)}",
        *(["Content-Type: application/json"] if data else []),
        *([f"Authorization: Bearer {key}"] if key else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


async def _begun(reader: asyncio.StreamReader) -> Reply:
    first = (await reader.readline()).split(None, 2)
    if len(first) < 2:
        raise OSError("no status came")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return Reply(int(first[1]), headers, reader)


async def checked(reply: Reply) -> Reply:
    """The same reply, if it is no error.

    Raises:
        NoAnswerError: with what the server says.
    """
    if reply.status == 200:
        return reply
    text = await reply.text()
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text[:200]
    raise NoAnswerError(f"status {reply.status}: {message}", reply.status)
