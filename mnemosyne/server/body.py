"""Bodies of requests as they arrive: small ones in memory, large ones in a file without a name."""

from __future__ import annotations

import asyncio
import tempfile
from typing import IO, Any

from mnemosyne.server.errors import ApiError

SMALL_BYTES = 64 << 10  # what is kept in memory


class Gone(Exception):
    """The client has left in the middle of its body."""


class Body:
    """Body of a request, up to a limit.

    Args:
        limit_bytes: of it.
        wait_s: for its next part.
    """

    def __init__(self, limit_bytes: int, wait_s: float | None = None) -> None:
        self._limit, self._wait_s = limit_bytes, wait_s
        self._parts: list[bytes] = []
        self.file: IO[bytes] | None = None  # where it is large
        self.num_bytes = 0

    async def receive(self, receive: Any, announced: int | None) -> None:
        """Take all of it from an ASGI server.

        Args:
            receive: of ASGI.
            announced: bytes that the client says will come.

        Raises:
            ApiError: 413, as soon as it is known to be too large; 408, if its rest does not come.
            Gone: if the client left.
        """
        if announced is not None and announced > self._limit:
            raise too_large(self._limit, announced)
        while True:
            message = await next_part(receive, self._wait_s, self.num_bytes)
            if message["type"] == "http.disconnect":
                raise Gone
            self.add(message.get("body", b""))
            if not message.get("more_body"):
                return

    def add(self, part: bytes) -> None:
        """Append a part.

        Raises:
            ApiError: 413, if that is too much.
        """
        self.num_bytes += len(part)
        if self.num_bytes > self._limit:
            raise too_large(self._limit, self.num_bytes)
        if self.file is None and self.num_bytes > SMALL_BYTES:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the body
            self.file.writelines(self._parts)
            self._parts.clear()
        if self.file is not None:
            self.file.write(part)
        else:
            self._parts.append(part)

    def in_memory(self) -> bytes:
        assert self.file is None, "large ones lie in a file"
        return b"".join(self._parts)

    def close(self) -> None:
        """Forget it."""
        if self.file is not None:
            self.file.close()


async def next_part(receive: Any, wait_s: float | None, num_bytes: int) -> Any:
    """Wait for the next message of a body of which so many bytes are there.

    Raises:
        ApiError: 408, if it does not come.
    """
    try:
        async with asyncio.timeout(wait_s):
            return await receive()
    except TimeoutError as error:
        raise ApiError(
            408,
            f"body must come without a pause of {wait_s:g} s, got {num_bytes:,} bytes of it; "
            "send it again",
            headers={"Connection": "close"},
        ) from error


def too_large(limit_bytes: int, num_bytes: int) -> ApiError:
    """Make the refusal of a body of so many bytes."""
    return ApiError(
        413,
        f"body must hold at most {limit_bytes:,} bytes, got {num_bytes:,} or more; shorten it or "
        "raise serve.max_body",
    )
