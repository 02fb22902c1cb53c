"""The backend of a front: an engine in other processes, which may die and come back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from mnemosyne.server.backend import About, Event, Job, Status
from mnemosyne.server.condemned import Condemned
from mnemosyne.server.link import Link
from mnemosyne.server.sources import Engine, EngineEndedError, Source
from mnemosyne.server.task import Task, completed
from mnemosyne.server.trial import MOST_DEATHS, judge
from mnemosyne.server.words import (
    Beat,
    Cancel,
    Clear,
    Cleared,
    End,
    Events,
    Leaving,
    Loading,
    Ready,
    Refused,
    Submit,
    decode_for_front,
    encode,
    id_bytes,
)

log = logging.getLogger(__name__)

TICK_S = 0.5
SILENT_S = 30.0  # without a word, after which ranks that are ready count as stuck
TRIAL_S = 30.0  # that what is new waits for those who were there at a death
MOST_FAILED_STARTS = 5  # in a row
LONGEST_PAUSE_S = 30.0  # between two of them


class RemoteBackend:
    """Jobs for an engine in other processes; a ``Backend``.

    When the engine dies, the jobs that it had are given to the next one with the tokens that came
    of them. Those that were there at the death come one by one, the shortest first: who is there
    at a second death without having got further is what ends engines, and is refused.

    Args:
        source: where engines come from.
        resume: whether jobs go on after a death; else they end with an error.
        on_leaving: called with the reason when somebody else told the ranks to end.
    """

    def __init__(
        self,
        source: Source,
        *,
        resume: bool = True,
        on_leaving: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._source = source
        self._resume = resume
        self._on_leaving = on_leaving
        self._numbers = count()
        self._tasks: dict[int, Task] = {}
        self._link: Link | None = None  # to an engine that takes jobs
        self._is_open = False  # whether jobs go to it at once
        self._is_strict = False  # whether suspects are tried before that, however long it takes
        self._stage = "starting"
        self._about: asyncio.Future[About] = asyncio.get_running_loop().create_future()
        self._status = Status(is_ready=False)
        self._heard_s = time.monotonic()
        self._condemned = Condemned()
        self._clearing: list[asyncio.Future[int]] = []
        self._folder: TemporaryDirectory[str] | None = None  # of a tokenizer that has no other
        self._is_ending = False
        self._having: asyncio.Future[None] | None = None  # engines, one after the other
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._counts = {"engine_deaths": 0, "resumed_requests": 0, "condemned_requests": 0}

    async def run(self) -> None:
        """Have an engine until ``close``.

        Raises:
            EngineEndedError: if there is none and trying again is no use.
        """
        self._having = asyncio.ensure_future(self._run())
        try:
            await self._having
        except asyncio.CancelledError:
            if not self._is_ending:
                raise
            for task in list(self._tasks.values()):
                task.fail("the server ended")
        finally:
            if self._folder is not None:
                self._folder.cleanup()

    async def _run(self) -> None:
        num_failed, was_ready = 0, False
        while True:
            async with self._source.engine() as engine:
                is_ready = await self._live(engine)
            if self._is_ending:
                return
            was_ready = was_ready or is_ready
            num_failed = 0 if is_ready else num_failed + 1
            status = engine.exit_status
            if status is not None and (not was_ready or num_failed > MOST_FAILED_STARTS):
                self._give_up()
                raise EngineEndedError("the engine did not start", status or 1)
            log.error("the engine ended (status %s); another one takes its place", status)
            if num_failed:
                await asyncio.sleep(min(2.0**num_failed, LONGEST_PAUSE_S))

    async def about(self) -> About:
        """Wait until the model is known."""
        return await asyncio.shield(self._about)

    def status(self) -> Status:
        """How the engine was when it last said so, and for how long it has said nothing."""
        counters = {**self._status.counters, **self._counts}
        if self._link is None:
            waiting = len(self._tasks)
            return Status(is_ready=False, stage=self._stage, num_waiting=waiting, counters=counters)
        silent_s = time.monotonic() - self._heard_s
        return replace(
            self._status,
            is_ready=True,
            heartbeat_age_s=self._status.heartbeat_age_s + silent_s,
            is_alive=self._status.is_alive and silent_s < SILENT_S,
            counters=counters,
        )

    @property
    def num_suspects(self) -> int:
        """Jobs that were there at a death and have got no further since."""
        return sum(task.num_deaths > 0 for task in self._tasks.values())

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        """Serve a job (see ``Backend``)."""
        self._condemned.check(job)
        task = Task(next(self._numbers), job, completed(job, await self.about()))
        self._tasks[task.number] = task
        self._is_empty.clear()
        num_running = job.params.n
        try:
            if self._is_open:
                await self._give(task)
            while num_running:
                for event in await task.events():
                    num_running -= event.finish_reason is not None
                    yield event
        finally:
            if task.is_given and not task.is_ended and self._link is not None:
                self._link.put(encode(Cancel(task.number)))
            task.further.set()
            self._forget(task)

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no job runs (see ``Backend``)."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._is_empty.wait(), timeout_s)
        late = list(self._tasks.values())
        for task in late:
            for sample in range(task.job.params.n):
                task.enter(Event(sample, finish_reason="cancelled"))
            if task.is_given and self._link is not None:
                self._link.put(encode(Cancel(task.number)))
        return not late

    async def clear_cache(self) -> int:
        """Forget kept prefixes (see ``Backend``)."""
        if self._link is None:
            return 0
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._clearing.append(answer)
        self._link.put(encode(Clear()))
        return await answer

    async def close(self) -> None:
        """Have the ranks end in good order; ``run`` returns once they have."""
        self._is_ending = True
        if self._link is not None:
            self._link.put(encode(End()))
            await self._link.flush()
        elif self._having is not None:
            self._having.cancel()  # one that is not ready has no job, and may never come

    # One engine, from its start to its death.

    async def _live(self, engine: Engine) -> bool:
        """Hear an engine until it is gone; whether it was ever ready."""
        self._stage, self._heard_s = "starting", time.monotonic()
        helpers = [asyncio.create_task(self._watch(engine))]
        try:
            while (data := await engine.link.receive()) is not None:
                self._heard_s = time.monotonic()
                word = decode_for_front(data)
                if isinstance(word, Ready):
                    self._begin(word, engine.link)
                    helpers.append(asyncio.create_task(self._try_suspects()))
                    if not self._is_strict:
                        helpers.append(asyncio.create_task(self._open(TRIAL_S)))
                else:
                    self._take(word)
        except ValueError as error:
            log.error("rank 0 said what it cannot say: %s", error)
            engine.kill()
        finally:
            for helper in helpers:
                helper.cancel()
        was_ready = self._link is not None
        self._note_death()
        return was_ready

    def _begin(self, word: Ready, link: Link) -> None:
        if not self._about.done():
            self._about.set_result(self._with_tokenizer(word))
        self._link = link
        self._status = Status(is_ready=True)

    def _with_tokenizer(self, word: Ready) -> About:
        """Add a folder of the tokenizer to what is known."""
        if not word.files:
            return word.about
        self._folder = TemporaryDirectory(prefix="mnemosyne-")
        for name, content in word.files.items():
            (Path(self._folder.name) / Path(name).name).write_bytes(content)
        return replace(word.about, tokenizer_dir=self._folder.name)

    def _take(self, word: object) -> None:
        match word:
            case Events():
                for number, event in word.items:
                    task = self._tasks.get(number)
                    if task is not None:
                        task.enter(event)
            case Beat():
                self._status = word.status
            case Refused():
                task = self._tasks.get(word.job)
                if task is not None:
                    self._refuse(task, word.reason)
            case Loading():
                self._stage = word.stage
            case Cleared():
                for answer in self._clearing:
                    if not answer.done():
                        answer.set_result(word.num_pages)
                self._clearing.clear()
            case Leaving():
                self._on_leaving(word.reason)

    async def _watch(self, engine: Engine) -> None:
        """Kill ranks that are stuck: their own watchdog does, unless it is stopped as well."""
        while True:
            await asyncio.sleep(TICK_S)
            if self._link is not None and not self.status().is_alive:
                log.error("the engine says nothing for %.0f s and is killed", SILENT_S)
                engine.kill()
                return

    async def _try_suspects(self) -> None:
        """Give an engine that is new the jobs that were there at a death, then all others."""
        suspects = [task for task in self._tasks.values() if task.num_deaths]
        for task in sorted(suspects, key=lambda task: task.num_to_compute):
            if task.number in self._tasks and not task.is_ended:
                self._counts["resumed_requests"] += 1
                await self._give(task)
                await task.further.wait()
        await self._open(0.0)

    async def _open(self, after_s: float) -> None:
        """Give jobs at once from some time on."""
        await asyncio.sleep(after_s)
        self._is_open = True
        for task in [task for task in self._tasks.values() if not task.num_deaths]:
            await self._give(task)

    async def _give(self, task: Task) -> None:
        if self._link is None or task.is_ended or task.is_given:
            return
        task.is_given = True
        given = task.given()
        word = Submit(
            task.number,
            id_bytes(task.job.prompt_ids),
            task.params,
            given if any(ids or ids is None for ids in given) else (),
        )
        try:
            self._link.put(encode(word))
        except ValueError as error:
            self._refuse(task, str(error))
            return
        await self._link.flush()

    def _note_death(self) -> None:
        """Keep what the jobs have, refuse those that end engines."""
        self._link, self._is_open = None, False
        for answer in self._clearing:
            answer.cancel()
        self._clearing.clear()
        given = [task for task in self._tasks.values() if task.is_given and not task.is_ended]
        if self._is_ending:
            for task in given:
                task.fail("the server ended")
            return
        self._counts["engine_deaths"] += 1
        self._is_strict = judge(given)
        for task in given:
            if not self._resume:
                task.fail("the engine died; send the request again")
            elif task.num_deaths >= MOST_DEATHS:
                self._condemn(task)

    def _condemn(self, task: Task) -> None:
        self._counts["condemned_requests"] += 1
        self._condemned.add(task.job)
        log.error("request %s ended the engine twice and is refused", task.job.job_id)
        task.fail("the request ended the engine twice, and is refused for an hour")

    def _refuse(self, task: Task, reason: str) -> None:
        if task.num_tokens:  # its reader has been given some of it already
            task.fail(reason)
        else:
            task.refuse(ValueError(reason))

    def _give_up(self) -> None:
        for task in self._tasks.values():
            task.fail("the engine cannot be started")

    def _forget(self, task: Task) -> None:
        del self._tasks[task.number]
        if not self._tasks:
            self._is_empty.set()
