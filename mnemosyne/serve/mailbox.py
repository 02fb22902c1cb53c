"""Pieces on their way from the engine's thread to one reader on an event loop."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import NamedTuple

from mnemosyne.request import Logprobs, Piece


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
        self._unread: dict[int | None, _Unread] = {}  # by request, in the order of their coming
        self._has_mail = asyncio.Event()
        self._is_told = False  # the loop knows, or is about to

    def put(self, piece: Piece) -> None:
        """Add a piece; any thread may."""
        with self._lock:
            unread = self._unread.get(piece.request_id)
            if unread is None:
                unread = self._unread[piece.request_id] = _Unread()
            unread.add(piece)
            is_told, self._is_told = self._is_told, True
        if not is_told:
            with suppress(RuntimeError):  # the loop was closed, nobody reads any more
                self._loop.call_soon_threadsafe(self._has_mail.set)

    async def take(self) -> list[Piece]:
        """Wait for pieces; what has come since the last call, one per request."""
        await self._has_mail.wait()
        with self._lock:
            unread, self._unread = self._unread, {}
            self._has_mail.clear()
            self._is_told = False
        return [entry.piece() for entry in unread.values()]


class _Unread:
    """Pieces of one request, joined."""

    __slots__ = ("_last", "_logprobs", "_prompt_logprobs", "_texts", "_token_ids")

    def __init__(self) -> None:
        self._last: Piece | None = None
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: tuple[Logprobs | None, ...] | None = None

    def add(self, piece: Piece) -> None:
        self._last = piece
        self._token_ids += piece.token_ids
        if piece.text:
            self._texts.append(piece.text)
        self._logprobs += piece.logprobs
        self._prompt_logprobs = piece.prompt_logprobs or self._prompt_logprobs

    def piece(self) -> Piece:
        assert self._last is not None, "it is made for a piece"
        return self._last._replace(
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )


class Addressee(NamedTuple):
    """The mailbox that the pieces of a request go to, and the sample that it is."""

    mailbox: Mailbox
    sample: int
