"""Rank 0's end of the link: jobs of the front run on an engine, and their results go back."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping

from mnemosyne.request import Piece
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.serve.mailbox import Mailbox
from mnemosyne.server.backend import Backend, Event
from mnemosyne.server.embedded import event_of
from mnemosyne.server.link import Link
from mnemosyne.server.words import (
    Beat,
    Cancel,
    Clear,
    Cleared,
    End,
    Events,
    Ready,
    Refused,
    Submit,
    ToFront,
    decode_for_engine,
    encode,
)

log = logging.getLogger(__name__)

BEAT_S = 0.5


class EngineEnd:
    """Serves one front until it says ``End`` or is gone.

    A reader that is slow, the front itself or what is between, gets what has come meanwhile as one
    event per sample: nothing here grows with the time that it takes.

    Args:
        engine: runs the jobs; entered by the caller.
        backend: tells what the engine is and how it does.
        link: to the front.
        files: of a tokenizer that is nowhere on disk.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        backend: Backend,
        link: Link,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        self._files = dict(files or {})
        self._engine = engine
        self._backend = backend
        self._link = link
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._jobs: dict[int, set[int]] = {}  # requests of each job, once they are known
        self._job_of: dict[int, int] = {}  # by request
        self._lock = threading.Lock()  # for those two: the engine's thread enters requests
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def serve(self) -> bool:
        """Do so.

        Returns:
            Whether the front said that no job will follow; else it is gone, or spoke nonsense.

        Raises:
            RuntimeError: if the engine failed.
        """
        self._put(Ready(await self._backend.about(), self._files))
        parts = [asyncio.create_task(part) for part in (self._send(), self._beat())]
        hearing = asyncio.create_task(self._hear())
        try:
            await asyncio.wait([*parts, hearing], return_when=asyncio.FIRST_COMPLETED)
            if self._engine.failure is not None:
                raise RuntimeError(f"the engine failed: {self._engine.failure}")
            for part in parts:
                if part.done():
                    part.result()
            return hearing.done() and hearing.result()
        finally:
            with self._lock:
                self._is_over = True
            for task in (*parts, hearing, *self._tasks):
                task.cancel()
            for job in list(self._jobs):
                self._cancel(job)

    def _put(self, word: ToFront) -> None:
        self._link.put(encode(word))

    async def _hear(self) -> bool:
        """Take words until the end; whether it was said."""
        while (data := await self._link.receive()) is not None:
            try:
                word = decode_for_engine(data)
            except ValueError as error:
                log.error("the front said what it cannot say: %s", error)
                return False
            match word:
                case Submit():
                    self._begin(word)
                case Cancel():
                    self._cancel(word.job)
                case Clear():
                    self._put(Cleared(await self._backend.clear_cache()))
                case End():
                    return True
        return False

    def _begin(self, word: Submit) -> None:
        self._jobs[word.job] = set()
        task = asyncio.create_task(self._submit(word))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _submit(self, word: Submit) -> None:
        """Give a job to the engine, or say why it does not take it."""
        try:
            await self._engine.post(
                word.prompt_ids(), word.params, self._mailbox, word.given, self._noting(word.job)
            )
        except ValueError as error:
            if self._jobs.pop(word.job, None) is not None:
                self._put(Refused(word.job, str(error)))
        except RuntimeError:  # the engine does not run any more: see ``serve``
            log.debug("job %d came too late", word.job)

    def _noting(self, job: int) -> Callable[[list[int]], None]:
        """Make a function that enters a job's requests, before their first piece comes."""

        def note(request_ids: list[int]) -> None:
            with self._lock:
                members = self._jobs.get(job)
                if members is not None and not self._is_over:
                    members.update(request_ids)
                    self._job_of.update(dict.fromkeys(request_ids, job))
                    return
            for request_id in request_ids:  # it was cancelled meanwhile
                self._engine.cancel(request_id)

        return note

    def _cancel(self, job: int) -> None:
        with self._lock:
            members = self._jobs.pop(job, set())
        for request_id in members:
            self._engine.cancel(request_id)

    async def _send(self) -> None:
        """Send the pieces of steps, all of one moment as one message."""
        while True:
            pieces = await self._mailbox.take()
            if self._engine.failure is not None:
                return  # its reports about requests are no ends of theirs
            items = [self._event(piece) for piece in pieces]
            self._put(Events([(job, event) for job, event in items if job is not None]))
            await self._link.flush()

    def _event(self, piece: Piece) -> tuple[int | None, Event]:
        """A piece for the front, with its job, None if that was cancelled."""
        request_id = piece.request_id
        assert request_id is not None, "it was accepted"
        is_last = piece.finish_reason is not None
        with self._lock:
            job = self._job_of.get(request_id, -1)
            members = self._jobs.get(job)
            if is_last:
                self._job_of.pop(request_id, None)
                if members is not None:
                    members.discard(request_id)
                    if not members:
                        del self._jobs[job]
        return None if members is None else job, event_of(piece)

    async def _beat(self) -> None:
        """Tell that this process lives; an engine that failed ends it."""
        while self._engine.failure is None:
            self._put(Beat(self._backend.status()))
            await self._link.flush()
            await asyncio.sleep(BEAT_S)
