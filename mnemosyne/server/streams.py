"""Answers as server-sent events: headers at once, signs of life, an end when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from mnemosyne.server.answer import Answer, Part
from mnemosyne.server.backend import Event, Overloaded
from mnemosyne.server.dialects import Dialect
from mnemosyne.server.errors import FAILED, INVALID, OVERLOADED, error_object
from mnemosyne.server.exposition import Timer
from mnemosyne.server.presence import left
from mnemosyne.server.progress import PromptProgress
from mnemosyne.server.token_names import TokenNames

log = logging.getLogger(__name__)

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # or proxies hold what should be seen
]
PROGRESS_S = 0.5  # between two words on the progress of a prompt
MOST_PAIRS = 1024  # of tokens and log-probabilities in one event: 0.1 MB, 1 ms
TICKS = 5  # looks at the clock within the shorter of both times
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class EventStream:
    """One answer as a stream; an ASGI application for its own request.

    Args:
        answer: state of the request.
        events: of its jobs.
        first: of these, on its way already.
        dialect: how they are written.
        names: of tokens.
        progress: of the prompt.
        timer: of tokens, for metrics.
        keep_alive_s: silence after which a chunk without choices is sent.
        write_s: that the client may leave what is sent to it.
    """

    def __init__(
        self,
        answer: Answer,
        events: AsyncIterator[tuple[int, Event]],
        first: asyncio.Future[tuple[int, Event]],
        dialect: Dialect,
        *,
        names: TokenNames,
        progress: PromptProgress,
        timer: Timer,
        keep_alive_s: float,
        write_s: float,
    ) -> None:
        self._answer, self._dialect = answer, dialect
        self._events, self._first = events, first
        self._names, self._progress, self._timer = names, progress, timer
        self._keep_alive_s, self._write_s = keep_alive_s, write_s
        self._sent_s = self._told_s = time.monotonic()
        self._writing_s: float | None = None  # since when a write waits for the client
        self.outcome = "finished"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it all; returns early if the client leaves or does not read."""
        self._send_raw = scope["state"]["send"]
        task = asyncio.current_task()
        assert task is not None, "it runs in one"
        helpers = [
            asyncio.create_task(self._watch(receive, task)),
            asyncio.create_task(self._tick(task)),
        ]
        try:
            await self._run(send, helpers)
        except asyncio.CancelledError:
            if self.outcome == "finished":  # somebody else's: the server ends
                self.outcome = "cancelled"
                raise
            task.uncancel()
        finally:
            self._first.cancel()
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, self._first, return_exceptions=True)
            await self._events.aclose()  # type: ignore[attr-defined]

    async def _run(self, send: Any, helpers: list[asyncio.Task[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
        for opened in self._dialect.opening(self._answer):
            await self._send_object(opened)
        try:
            await self._take(*await self._first)
            async for prompt, event in self._events:
                await self._take(prompt, event)
        except ValueError as error:
            await self._fail(str(error), INVALID)
        except Overloaded as error:
            await self._fail(str(error), OVERLOADED)
        except RuntimeError as error:
            log.error("%s: %s", self._answer.id, error)
            await self._fail("the engine failed; send the request again", FAILED)
        if self._answer.inquiry.include_usage and self.outcome == "finished":
            chunk = self._dialect.chunk(self._answer, [])
            await self._send_object({**chunk, "usage": self._answer.usage()})
        for helper in helpers:  # nothing is sent behind the end
            helper.cancel()
        await self._send(DONE, is_last=True)

    async def _take(self, prompt: int, event: Event) -> None:
        """Send what an event brings."""
        if event.finish_reason in ("error", "cancelled"):
            self._answer.enter(prompt, event)
            said = event.error or "the server ended the request"
            await self._fail(said, FAILED)
            return
        part = self._answer.enter(prompt, event)
        if part is None:
            await self._tell_progress()
            return
        self._timer.note(part.index, len(event.token_ids))
        if self._answer.inquiry.logprobs and part.logprobs and part.prompt_logprobs is None:
            await self._send_split(part)
            return
        if self._answer.inquiry.logprobs:
            await self._names.learn(part.logprobs, part.prompt_logprobs, part.echoed_ids)
        await self._send_object(self._chunk(part))

    async def _send_split(self, part: Part) -> None:
        """Send what a slow reader has left to pile up, a bounded number of bytes at a time."""
        most = max(1, MOST_PAIRS // (1 + len(part.logprobs[0].top)))
        offset = part.text_offset
        for each in part.split(most):
            each.text_offset = offset
            await self._names.learn(each.logprobs)
            await self._send_object(self._chunk(each))
            offset += sum(len(self._names.text(entry.token_id)) for entry in each.logprobs)
            await asyncio.sleep(0)

    def _chunk(self, part: Part) -> dict[str, Any]:
        chunk = self._dialect.delta(self._answer, part, self._names)
        if self._answer.inquiry.continuous_usage:
            chunk["usage"] = self._answer.usage()
        return chunk

    async def _tell_progress(self) -> None:
        now_s = time.monotonic()
        if self._answer.inquiry.return_progress and now_s - self._told_s >= PROGRESS_S:
            await self._send_sign(now_s)

    async def _send_sign(self, now_s: float) -> None:
        """Send a chunk that says nothing but that all is well, and how far the prompt is."""
        self._told_s = now_s
        chunk = self._dialect.chunk(self._answer, [])
        if self._answer.inquiry.return_progress:
            chunk["prompt_progress"] = self._progress.told()
        await self._send_object(chunk)

    async def _fail(self, message: str, kind: str) -> None:
        self.outcome = "failed"
        await self._send_object(error_object(message, kind))

    async def _send_object(self, content: dict[str, Any]) -> None:
        await self._send(b"data: " + _encode(content) + b"\n\n")

    async def _send(self, data: bytes, *, is_last: bool = False) -> None:
        self._sent_s = self._writing_s = time.monotonic()
        await self._send_raw({"type": "http.response.body", "body": data, "more_body": not is_last})
        self._writing_s = None

    async def _watch(self, receive: Any, task: asyncio.Task[Any]) -> None:
        """End the stream when its client leaves."""
        await left(receive)
        self._stop(task, "left")

    async def _tick(self, task: asyncio.Task[Any]) -> None:
        """Send signs of life; end the stream when its client does not read."""
        period_s = min(self._keep_alive_s, self._write_s) / TICKS
        while True:
            await asyncio.sleep(period_s)
            now_s = time.monotonic()
            if self._writing_s is not None:
                if now_s - self._writing_s > self._write_s:
                    self._stop(task, "stalled")
            elif now_s - self._sent_s >= self._keep_alive_s:
                await self._send_sign(now_s)

    def _stop(self, task: asyncio.Task[Any], outcome: str) -> None:
        if self.outcome == "finished":
            self.outcome = outcome
            task.cancel()
