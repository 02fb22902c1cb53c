"""Watch over a client while something is done for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from mnemosyne.server.body import Gone

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]


async def left(receive: Receive) -> None:
    """Wait until the client resets, closes or half-closes its connection; its body was read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_present(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do some work for a client as long as it is there.

    Raises:
        Gone: if it left; the work is cancelled then.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise Gone
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
