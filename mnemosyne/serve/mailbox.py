"""Pieces on their way from the engine's thread to one reader on an event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import NamedTuple

from mnemosyne.request import Piece
from mnemosyne.serve.unread import Unread


class Mailbox:
    """Pieces that a reader has not read yet.

    What comes for a request while its reader is elsewhere is joined to one piece. So a reader
    that stops holds at most one piece per request, of what that request may say at most.

    Args:
        loop: the reader's.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._unread: Unread[Piece] = Unread()  # by request
        self._has_mail = asyncio.Event()
        self._is_told = False  # the loop knows, or is about to

    def put(self, piece: Piece) -> None:
        """Add a piece; any thread may."""
        with self._lock:
            self._unread.add(piece.request_id, piece)
            is_told, self._is_told = self._is_told, True
        if not is_told:
            with suppress(RuntimeError):  # the loop was closed, nothing reads any more
                self._loop.call_soon_threadsafe(self._has_mail.set)

    async def take(self) -> list[Piece]:
        """Wait for pieces; those since the last call, joined to one per request."""
        await self._has_mail.wait()
        with self._lock:
            unread, self._unread = self._unread, Unread()
            self._has_mail.clear()
            self._is_told = False
        return unread.take()


class Addressee(NamedTuple):
    """The mailbox that the pieces of a request go to, and the sample that it is."""

    mailbox: Mailbox
    sample: int
