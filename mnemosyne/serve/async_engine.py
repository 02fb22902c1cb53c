"""The engine behind an event loop: one thread steps, coroutines submit and receive pieces."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from mnemosyne.request import Piece, SamplingParams
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.prompts import Prompt

log = logging.getLogger(__name__)


class AsyncEngine:
    """Runs an engine in a thread of its own, for use from asyncio.

    Args:
        engine: idle; nobody else may step it from here on.

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
        self._queues: dict[int, asyncio.Queue[Piece]] = {}
        self._thread: threading.Thread | None = None
        self._is_stopping = False
        self._failure: BaseException | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._is_stopping, self._failure = False, None
        self._thread = threading.Thread(target=self._run, name="mnemosyne-engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the thread after the step it is in; what still runs is cancelled."""
        with self._lock:
            self._is_stopping = True
        self._wake.set()
        assert self._thread is not None
        await asyncio.to_thread(self._thread.join)

    async def submit(self, prompt: Prompt, params: SamplingParams) -> AsyncIterator[Piece]:
        """Serve one prompt.

        Args:
            prompt: text or token ids.
            params: how to sample; with ``params.n`` above 1 the pieces of the samples interleave
                and are told apart by ``request_id``.

        Yields:
            New tokens and text, or how far the prompt is computed. The last piece of a sample has
            a ``finish_reason``. Leaving the loop early cancels the request.

        Raises:
            ValueError: if the prompt is refused.
            RuntimeError: if the engine failed or was stopped.
        """
        queue: asyncio.Queue[Piece] = asyncio.Queue()
        is_done = False
        try:
            num_running = await self._call(lambda: self._accept(prompt, params, queue))
            while num_running:
                piece = await queue.get()
                num_running -= piece.finish_reason is not None
                is_done = num_running == 0
                yield piece
        finally:
            # by the queue: a submitter may leave before it knows the ids of its requests
            if not is_done:
                self._post_if_running(lambda: self._drop(queue))

    def cancel(self, request_id: int) -> None:
        """End a request; its stream ends with a piece whose ``finish_reason`` is "cancelled"."""
        self._post_if_running(lambda: self._cancel(request_id))

    async def _call(self, function: Callable[[], int]) -> int:
        """Run a function on the engine's thread, between two steps, and wait for its value."""
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                value = function()
            except Exception as error:  # noqa: BLE001  # whoever asked gets it, whatever it is
                self._to_loop(_fail, future, error)
            else:
                self._to_loop(_fulfil, future, value)

        self._post(run)
        return await future

    def _check_runs(self) -> None:
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

    def _accept(self, prompt: Prompt, params: SamplingParams, queue: asyncio.Queue[Piece]) -> int:
        """Add a prompt; the number of its requests, whose pieces go to the queue from now on."""
        self._check_runs()
        outputs = self._engine.add(prompt, params)
        for output in outputs:
            assert output.request_id is not None
            self._queues[output.request_id] = queue
        return len(outputs)

    def _cancel(self, request_id: int) -> None:
        self._engine.cancel(request_id)
        self._deliver(Piece(request_id, finish_reason="cancelled"))

    def _drop(self, queue: asyncio.Queue[Piece]) -> None:
        """Cancel the requests of a submitter who left."""
        for request_id in [i for i, own in self._queues.items() if own is queue]:
            del self._queues[request_id]
            self._engine.cancel(request_id)

    def _deliver(self, piece: Piece) -> None:
        assert piece.request_id is not None
        queue = self._queues.get(piece.request_id)
        if queue is None:
            return
        if piece.finish_reason is not None:
            del self._queues[piece.request_id]
        self._to_loop(queue.put_nowait, piece)

    def _run(self) -> None:
        try:
            self._engine.measure()
            while not self._is_stopping:
                while self._calls:
                    self._calls.popleft()()
                if self._engine.has_work:
                    for piece in self._engine.step():
                        self._deliver(piece)
                elif not self._calls:
                    self._wake.wait()
                    self._wake.clear()
            self._end_all("cancelled", None)
        except BaseException as error:
            # nobody waits on this thread: hand the failure to every stream, and keep it
            self._failure = error
            log.exception("the engine failed; all its requests end")
            self._end_all("error", f"the engine failed: {error}")

    def _end_all(self, reason: str, error: str | None) -> None:
        with self._lock:
            self._is_stopping = True
        self._engine.abort(reason, error)
        while self._calls:
            self._calls.popleft()()
        for request_id in list(self._queues):
            self._deliver(Piece(request_id, finish_reason=reason, error=error))


def _fail(future: asyncio.Future[int], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _fulfil(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)
