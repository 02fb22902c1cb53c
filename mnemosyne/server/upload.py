"""Prompts that are uploaded in pieces: JSON lines, first the request, then ids of its prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Annotated, Any

import msgspec
import numpy as np
from starlette.requests import Request

from mnemosyne.plain import shown
from mnemosyne.request import SamplingParams
from mnemosyne.serve.pieces import gather, prefill_only
from mnemosyne.server.backend import About, Backend, Job
from mnemosyne.server.body import Gone, next_part, too_large
from mnemosyne.server.errors import ApiError

CONTENT_TYPES = ("application/jsonl", "application/x-ndjson")
LINE_BYTES = 128 << 10  # of a line: what is parsed on the event loop at a time, in 2 ms
LEAST_BYTES = 64  # that a line counts as: an empty list takes as long as so many bytes

_ids = msgspec.json.Decoder(list[Annotated[int, msgspec.Meta(ge=0, lt=2**31)]])


def is_upload(request: Request) -> bool:
    """Return whether a request says that its body is JSON lines."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    return kind.strip().lower() in CONTENT_TYPES


class Upload:
    """Lines of a body as they come; no more than one waits here.

    Args:
        receive: of ASGI.
        limit_bytes: of all of it.
        wait_s: for its next part.
        count: is told the number of ids of each line that is taken.
    """

    def __init__(
        self, receive: Any, limit_bytes: int, wait_s: float, count: Callable[[int], None]
    ) -> None:
        self._receive, self._limit_bytes, self._wait_s = receive, limit_bytes, wait_s
        self._count = count
        self._lines = self._split()
        self._number = 0

    async def opening(self) -> bytes:
        """The first line.

        Raises:
            ApiError: if there is none, or what comes is too long or too late.
            Gone: if the client left.
        """
        line = await anext(self._lines, None)
        if line is None:
            raise ApiError(400, "body must hold JSON lines, got none; begin with an object")
        return line

    async def prompt(
        self, backend: Backend, about: About, params: SamplingParams, name: str
    ) -> np.ndarray:
        """The ids of all further lines, int64, most of them prefilled by then.

        Args:
            backend: prefills what has come.
            about: what it is.
            params: that the prompt is to be served with.
            name: of the request.

        Raises:
            ApiError: as above, and if a line is no list of ids.
            ValueError: if they are none or too many.
            RuntimeError: if the engine ends what has come: it failed, or is drained.
            Gone: if the client left.
        """
        alone, fits = prefill_only(params), min(about.max_model_len, about.max_request_tokens)

        async def prefill(ids: np.ndarray) -> None:
            job = Job(job_id=f"{name}-upload", prompt_ids=ids, params=alone or params)
            async with aclosing(backend.submit(job)) as events:  # type: ignore[type-var]
                async for event in events:
                    if event.finish_reason in ("error", "cancelled"):
                        raise RuntimeError(event.error or "the server ended the request")

        return await gather(
            self._pieces(about.vocab_size),
            prefill,
            limit=fits - (params.max_tokens or 1),
            page_size=about.page_size if about.keeps_prefixes and alone else None,
        )

    async def _pieces(self, vocab_size: int) -> AsyncIterator[np.ndarray]:
        """The ids of every further line, int64, below ``vocab_size``."""
        async for line in self._lines:
            try:
                ids = np.array(_ids.decode(line), dtype=np.int64)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                raise self._no_ids(vocab_size, line[:64].decode(errors="replace")) from None
            if len(ids) and ids.max() >= vocab_size:
                raise self._no_ids(vocab_size, int(ids.max()))
            self._count(len(ids))
            yield ids

    def _no_ids(self, vocab_size: int, found: object) -> ApiError:
        return ApiError(
            400,
            f"prompt must be lists of token ids in [0, {vocab_size}), got {shown(found)} in line "
            f"{self._number}; write lines such as [1, 2, 3]",
            param="prompt",
        )

    async def _split(self) -> AsyncIterator[bytes]:
        """The lines of all parts; empty ones are left out."""
        rest, num_bytes, num_held, is_whole = b"", 0, 0, False
        while not is_whole:
            message = await next_part(self._receive, self._wait_s, num_bytes)
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > self._limit_bytes:
                raise too_large(self._limit_bytes, num_bytes)
            is_whole = not message.get("more_body")
            *lines, rest = (rest + part).split(b"\n")
            if is_whole:
                lines, rest = [*lines, rest], b""
            for line in (*lines, rest):
                if len(line) > LINE_BYTES:
                    raise ApiError(
                        413,
                        f"a line must hold at most {LINE_BYTES:,} bytes, got {len(line):,} or more "
                        f"in line {self._number + 1}; write several",
                    )
            for line in lines:
                self._number += 1
                if line.strip():
                    yield line
                num_held += max(len(line), LEAST_BYTES)
                if num_held >= LINE_BYTES:  # others first: a part may hold 100,000 lines
                    num_held = 0
                    await asyncio.sleep(0)
