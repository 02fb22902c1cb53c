"""The engine behind an event loop: one thread steps, coroutines submit and receive pieces.

Prompts are read in threads beside it: a text takes a second per megabyte, and no decode waits.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self, TypeVar

from mnemosyne.request import Piece, SamplingParams, own_params
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.futures import fail, fulfil
from mnemosyne.serve.intake import Given
from mnemosyne.serve.mailbox import Addressee, Mailbox
from mnemosyne.serve.ownership import Claim
from mnemosyne.serve.pieces import Pieces
from mnemosyne.serve.prompt_threads import PromptThreads
from mnemosyne.serve.prompts import Prompt, PromptIds

T = TypeVar("T")
log = logging.getLogger(__name__)


class AsyncEngine:
    """Runs an engine in a thread of its own, for use from asyncio.

    Args:
        engine: idle. Nobody else may use it inside ``async with``: other uses are refused there.

    Example:
        >>> async def main(llm):
        ...     async with AsyncEngine(llm.engine) as engine:
        ...         async for piece in engine.submit("Once", SamplingParams(max_tokens=8)):
        ...             print(piece.text, end="")
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls: deque[Callable[[], None]] = deque()  # run by the thread between steps
        self._lock = threading.Lock()  # a call is queued before the thread stops, or refused
        self._wake = threading.Event()
        self._streams: dict[int, Addressee] = {}  # by request
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._failure: BaseException | None = None
        self._turned_s: float | None = None  # when its loop last turned; None: it waits for work

    async def __aenter__(self) -> Self:
        """Start the thread.

        Raises:
            ValueError: if somebody else uses the engine, or it has requests.
        """
        if self._thread is not None and self._thread.is_alive():
            raise ValueError(
                "AsyncEngine must be entered once at a time, got one that runs; share it"
            )
        self._loop = asyncio.get_running_loop()
        self._is_stopping, self._failure = False, None
        started: asyncio.Future[int] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="mnemosyne-engine", daemon=True
        )
        self._thread.start()
        try:
            await started
        except BaseException:
            self._stop()
            raise
        self._readers = PromptThreads(self._engine.intake)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the thread after the step it is in; what still runs is cancelled."""
        self._stop()
        # nothing is cancelled there: who waits for a prompt hears that the engine stopped
        self._readers.close()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)

    def _stop(self) -> None:
        with self._lock:
            self._is_stopping = True
        self._wake.set()

    async def submit(
        self, prompt: Prompt | Pieces, params: SamplingParams, given: Given = ()
    ) -> AsyncIterator[Piece]:
        """Serve one prompt.

        Args:
            prompt: text, token ids, or a mapping that holds one of them; or an iterator, async
                or not, of ids or lists of them: prefill begins with the first, where the cache
                knows prefixes, and leaving the loop early ends it.
            params: how to sample; with ``params.n`` above 1 the pieces of the samples interleave
                and are told apart by ``sample``.
            given: tokens that each sample has already (see ``Engine.add``).

        Yields:
            New tokens and text, or how far the prompt is computed. A reader that is slower than
            the engine gets what has come meanwhile as one piece; one that stops reading holds no
            more than what its request may say. The last piece of a sample has a
            ``finish_reason``. Leaving the loop early cancels the request.

        Raises:
            ValueError: if the prompt is refused, or this is another event loop than the engine's.
            RuntimeError: if the engine failed or was stopped.
        """
        if isinstance(prompt, Iterator | AsyncIterator):
            self._check_runs()
            ledger, owned = self._engine.scheduler.ledger, own_params(params)
            page_size = ledger.page_size if ledger.shares else None
            prompt = await self._readers.gather(prompt, owned, self.submit, page_size)
        mailbox = Mailbox(asyncio.get_running_loop())
        is_done = False
        try:
            num_running = len(await self.post(prompt, params, mailbox, given))
            while num_running:
                for piece in await mailbox.take():
                    num_running -= piece.finish_reason is not None
                    is_done = num_running == 0
                    yield piece
        finally:
            # by the mailbox: a submitter may leave before it knows the ids of its requests
            if not is_done:
                self._post_if_running(lambda: self._drop(mailbox))

    async def post(
        self,
        prompt: Prompt,
        params: SamplingParams,
        mailbox: Mailbox,
        given: Given = (),
        note: Callable[[list[int]], None] | None = None,
    ) -> list[int]:
        """Serve one prompt as ``submit`` does, its pieces going to a mailbox of the caller's.

        Several prompts may share one, so that what a step brings is taken at once.

        Args:
            prompt: as for ``submit``, like all that is not named here.
            params: how to sample.
            mailbox: of the caller's event loop.
            given: tokens that each sample has already.
            note: called in the engine's thread with what this returns, before the first piece.

        Returns:
            Ids of the requests, one per sample that is wanted, in order.
        """
        owned = own_params(params)
        ids = await self._read(prompt)
        return await self._call(lambda: self._accept(ids, owned, mailbox, given, note))

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since its loop last turned; 0 while it waits for work."""
        turned_s = self._turned_s
        return 0.0 if turned_s is None else time.monotonic() - turned_s

    @property
    def num_streams(self) -> int:
        """Requests whose tokens somebody still reads."""
        return len(self._streams)

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the engine before its time, if any did."""
        return self._failure

    async def clear_cache(self) -> int:
        """Forget all cached prefixes between two steps.

        Returns:
            Pages that nobody held, and that are free now.
        """
        return await self._call(self._clear_cache)

    def _clear_cache(self) -> int:
        num_idle = self._engine.scheduler.ledger.num_idle
        self._engine.clear_cache()
        return num_idle

    async def _read(self, prompt: Prompt) -> PromptIds:
        """The ids of a prompt, read in a thread of its own."""
        self._check_runs()
        return await self._readers.read(prompt)

    def cancel(self, request_id: int | None = None) -> None:
        """End a request, or all; a stream ends with a piece whose reason is "cancelled"."""
        self._post_if_running(lambda: self._cancel(request_id))

    async def _call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine's thread, between two steps, and wait for its value."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                value = function()
            except Exception as error:  # noqa: BLE001  # whoever asked gets it, whatever it is
                self._to_loop(fail, future, error)
            else:
                self._to_loop(fulfil, future, value)

        self._post(run)
        return await future

    def _check_runs(self) -> None:
        self._engine.ownership.check_process()  # a fork has no thread that would answer
        if self._failure is not None:
            raise RuntimeError(f"the engine failed: {self._failure}") from self._failure
        if self._is_stopping or self._thread is None:
            raise RuntimeError("the engine does not run; submit inside `async with AsyncEngine`")

    def _post(self, call: Callable[[], None]) -> None:
        with self._lock:
            self._check_runs()
            self._calls.append(call)
        self._wake.set()

    def _post_if_running(self, call: Callable[[], None]) -> None:
        """The same for calls that have nothing to do once the engine has stopped."""
        with suppress(RuntimeError):
            self._post(call)

    def _to_loop(self, call: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop was closed, nobody listens any more
            self._loop.call_soon_threadsafe(call, *arguments)

    def _accept(
        self,
        prompt: PromptIds,
        params: SamplingParams,
        mailbox: Mailbox,
        given: Given,
        note: Callable[[list[int]], None] | None,
    ) -> list[int]:
        """Add a prompt; the ids of its requests, whose pieces go to the mailbox from now on."""
        self._check_runs()
        outputs = self._engine.add(prompt, params, given)
        samples = [i for i in range(params.n) if not given or given[i] is not None]
        request_ids = [output.request_id for output in outputs if output.request_id is not None]
        for request_id, sample in zip(request_ids, samples, strict=True):
            self._streams[request_id] = Addressee(mailbox, sample)
        if note is not None:
            note(request_ids)
        for request_id, output in zip(request_ids, outputs, strict=True):
            if output.finish_reason is not None:  # by what was given
                self._end(request_id, output.finish_reason, stop=output.stop_reason)
        return request_ids

    def _cancel(self, request_id: int | None) -> None:
        for each in list(self._streams) if request_id is None else [request_id]:
            self._engine.cancel(each)
            self._end(each, "cancelled")

    def _end(
        self,
        request_id: int,
        reason: str,
        *,
        error: str | None = None,
        stop: int | str | None = None,
    ) -> None:
        """Deliver the end of a request that no step brings; its reader may be gone already."""
        stream = self._streams.get(request_id)
        if stream is not None:
            piece = Piece(request_id, finish_reason=reason, error=error, sample=stream.sample)
            self._deliver(piece._replace(stop_reason=stop))

    def _drop(self, mailbox: Mailbox) -> None:
        """Cancel the requests of a submitter who left."""
        for request_id in [i for i, own in self._streams.items() if own.mailbox is mailbox]:
            del self._streams[request_id]
            self._engine.cancel(request_id)

    def _deliver(self, piece: Piece) -> None:
        assert piece.request_id is not None
        stream = self._streams.get(piece.request_id)
        if stream is None:
            return
        if piece.finish_reason is not None:
            del self._streams[piece.request_id]
        stream.mailbox.put(piece)

    def _run(self, started: asyncio.Future[int]) -> None:
        """Run the thread: claim the engine, serve, give it back."""
        try:
            with self._engine.ownership.claim(
                "AsyncEngine", ends_alone=False, remedy="leave its `async with` first, or submit"
            ) as claim:
                if self._engine.has_work:
                    raise ValueError(
                        "AsyncEngine must have an idle engine, got one with requests that were "
                        "added to it; step it until they are done"
                    )
                self._to_loop(fulfil, started, 0)
                self._serve(claim)
        except ValueError as error:  # of the claim; serving lets nothing out
            self._stop()
            self._to_loop(fail, started, error)

    def _serve(self, claim: Claim) -> None:
        try:
            self._engine.measure()
            while not self._is_stopping:
                self._turned_s = time.monotonic()
                claim.check()
                while self._calls:
                    self._calls.popleft()()
                if self._engine.has_work:
                    for piece in self._engine.step():
                        self._deliver(piece)
                elif not self._calls:
                    self._turned_s = None
                    self._wake.wait()
                    self._wake.clear()
            self._end_all(claim, "cancelled", None)
        except BaseException as error:
            # nobody waits on this thread: hand the failure to every stream, and keep it
            self._failure = error
            log.exception("the engine failed; all its requests end")
            self._end_all(claim, "error", f"the engine failed: {error}")

    def _end_all(self, claim: Claim, reason: str, error: str | None) -> None:
        self._turned_s = None
        self._stop()
        if not claim.is_revoked:  # whoever took the engine has ended them
            self._engine.abort(reason, error)
        while self._calls:
            self._calls.popleft()()
        for request_id in list(self._streams):
            self._end(request_id, reason, error=error)
