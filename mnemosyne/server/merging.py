"""Events of the jobs of one request as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from mnemosyne.server.backend import Backend, Event, Job


async def merged(backend: Backend, jobs: Sequence[Job]) -> AsyncIterator[tuple[int, Event]]:
    """Serve several jobs together.

    Yields:
        The index of a job, and an event of it. Leaving the loop early cancels all of them.

    Raises:
        ValueError: if one is refused; the others are cancelled.
        Overloaded: likewise.
    """
    if len(jobs) == 1:
        async with aclosing(backend.submit(jobs[0])) as events:  # type: ignore[type-var]
            async for event in events:
                yield 0, event
        return
    # One place: a pump that finds it taken waits, and its job's events are joined meanwhile.
    inbox: asyncio.Queue[tuple[int, Event | BaseException | None]] = asyncio.Queue(1)

    async def pump(index: int, job: Job) -> None:
        try:
            async with aclosing(backend.submit(job)) as events:  # type: ignore[type-var]
                async for event in events:
                    await inbox.put((index, event))
        except Exception as error:  # noqa: BLE001  # the reader of the stream gets it
            await inbox.put((index, error))
        else:
            await inbox.put((index, None))

    tasks = [asyncio.ensure_future(pump(index, job)) for index, job in enumerate(jobs)]
    num_running = len(tasks)
    try:
        while num_running:
            index, item = await inbox.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
