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
            raise self._too_large(announced)
        while True:
            message = await self._next(receive)
            if message["type"] == "http.disconnect":
                raise Gone
            self.add(message.get("body", b""))
            if not message.get("more_body"):
                return

    async def _next(self, receive: Any) -> Any:
        try:
            async with asyncio.timeout(self._wait_s):
                return await receive()
        except TimeoutError as error:
            raise ApiError(
                408,
                f"body must come without a pause of {self._wait_s:g} s, got {self.num_bytes:,} "
                "bytes of it; send it again",
                headers={"Connection": "close"},
            ) from error

    def add(self, part: bytes) -> None:
        """Append a part.

        Raises:
            ApiError: 413, if that is too much.
        """
        self.num_bytes += len(part)
        if self.num_bytes > self._limit:
            raise self._too_large(self.num_bytes)
        if self.file is None and self.num_bytes > SMALL_BYTES:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the body
            self.file.writelines(self._parts)
            self._parts.clear()
        if self.file is not None:
            self.file.write(part)
        else:
            self._parts.append(part)

    def _too_large(self, num_bytes: int) -> ApiError:
        return ApiError(
            413,
            f"body must hold at most {self._limit:,} bytes, got {num_bytes:,} or more; "
            "shorten it or raise serve.max_body",
        )

    def in_memory(self) -> bytes:
        assert self.file is None, "large ones lie in a file"
        return b"".join(self._parts)

    def close(self) -> None:
        """Forget it."""
        if self.file is not None:
            self.file.close()
