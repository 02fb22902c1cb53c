"""Threads that read prompts beside an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from numbers import Integral
from threading import Thread
from typing import Any, TypeVar, cast

import numpy as np

from mnemosyne.request import Piece, SamplingParams
from mnemosyne.serve.futures import fail, fulfil
from mnemosyne.serve.intake import Intake
from mnemosyne.serve.pieces import Ids, Pieces, gather, prefill_only
from mnemosyne.serve.prompts import Prompt, PromptIds

T = TypeVar("T")
NUM_THREADS = 4  # prompts that are read at a time; one of a few words waits behind long ones else
NUM_TAKEN = 4096  # single ids that are taken from an iterator at a time

Submit = Callable[[PromptIds, SamplingParams], AsyncIterator[Piece]]


class PromptThreads:
    """Reads prompts for coroutines of the event loop that runs now.

    Args:
        intake: knows what a prompt may hold.
    """

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="mnemosyne-prompts")

    async def read(self, prompt: Prompt) -> PromptIds:
        """The ids of a prompt.

        Raises:
            ValueError: if it is refused, or asked for on another event loop.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise ValueError(
                "submit must be awaited on the event loop that entered AsyncEngine, got another "
                "one; submit there by asyncio.run_coroutine_threadsafe"
            )
        return await self._loop.run_in_executor(self._threads, self._intake.read, prompt)

    async def pieces(self, prompt: Pieces) -> AsyncIterator[np.ndarray]:
        """The ids of a prompt that comes in pieces; those of an iterator are waited for apart.

        Raises:
            ValueError: if a piece holds anything but ids of the model.
        """
        if isinstance(prompt, AsyncIterator):
            async for piece in prompt:
                ids = [piece] if isinstance(piece, Integral) else piece
                yield (await self.read(cast(Prompt, ids))).ids
            return
        while (taken := await _apart(partial(_next, prompt))) is not None:
            yield (await self.read(cast(Prompt, taken))).ids

    async def gather(
        self, prompt: Pieces, params: SamplingParams, submit: Submit, page_size: int | None
    ) -> PromptIds:
        """The ids of a prompt that comes in pieces, most of them prefilled by then.

        Args:
            prompt: comes in pieces.
            params: that it is to be served with.
            submit: of the engine.
            page_size: tokens that the cache knows prefixes by; None: it knows none.

        Raises:
            ValueError: if it is refused.
        """
        alone = prefill_only(params)

        async def prefill(ids: np.ndarray) -> None:
            async for _ in submit(PromptIds(ids), alone or params):
                pass

        limit, pieces = self._intake.max_positions, self.pieces(prompt)
        if alone is None:
            page_size = None
        return PromptIds(await gather(pieces, prefill, limit=limit, page_size=page_size))

    def close(self) -> None:
        """End the threads once they have read what they read; whoever waits gets it."""
        self._threads.shutdown(wait=False)


async def _apart(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own: it may wait for long, and no exit waits for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            said = partial(fulfil, future, function())
        except BaseException as error:  # noqa: BLE001  # iterators are foreign; the loop gets it
            said = partial(fail, future, error)
        with suppress(RuntimeError):  # the loop was closed, nobody waits any more
            loop.call_soon_threadsafe(said)

    Thread(target=run, name="mnemosyne-pieces", daemon=True).start()
    return await future


def _next(prompt: Iterator[Ids]) -> Ids | None:
    """The next piece; single ids are put together. None at the end."""
    piece: Any = next(prompt, None)
    if not isinstance(piece, Integral):
        return cast(Ids | None, piece)
    return [int(piece), *islice(cast(Iterator[int], prompt), NUM_TAKEN - 1)]
