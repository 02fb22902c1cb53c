"""The backend of an engine in this process: a thread steps, the event loop is the server's."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self

from mnemosyne.metrics import StepRecord
from mnemosyne.parallel.watchdog import step_limit
from mnemosyne.request import Piece
from mnemosyne.serve.async_engine import AsyncEngine
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.prompts import PromptIds
from mnemosyne.server.backend import About, Event, Job, Status
from mnemosyne.server.totals import Totals
from mnemosyne.version import VERSION

IDLE_LIMIT_S = 300.0  # between two steps, in which requests are taken and step times measured
LOOK_S = 0.25  # between two looks at all requests
CANCEL_S = 5.0  # for readers to take the ends of jobs that a drain cuts off
POLL_S = 0.05  # between two looks at whether all has ended
SHORTEST = 1024  # tokens of the first length whose prefill is predicted


class EmbeddedBackend:
    """An engine of this process as a ``Backend``; it serves inside ``async with``.

    Args:
        engine: idle; None until ``attach`` brings it.
        entered: an ``AsyncEngine`` over it that somebody else has entered, and leaves.
        saves_tokenizer: whether a tokenizer that comes of no file is saved to one, for readers.
    """

    def __init__(
        self,
        engine: Engine | None = None,
        entered: AsyncEngine | None = None,
        *,
        saves_tokenizer: bool = True,
    ) -> None:
        self._saves_tokenizer = saves_tokenizer
        self._engine: Engine | None = None
        self._entered = entered
        self._async = entered
        self._stage = "starting"
        self._about: About | None = None
        self._known = asyncio.Event()
        self._num_jobs = 0
        self._totals = Totals()
        self._turned_s = self._looked_s = time.monotonic()
        self._backlog_s = 0.0
        self._curve: tuple[tuple[int, float], ...] = ()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._given = engine
        if entered is not None:
            assert engine is not None, "what is entered is known"
            self._know(engine)

    async def __aenter__(self) -> Self:
        if self._given is not None and self._entered is None:
            await self.attach(self._given)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._async is not None and self._entered is None:
            await self._async.__aexit__(kind, error, trace)
        if self._folder is not None:
            self._folder.cleanup()

    async def attach(self, engine: Engine) -> None:
        """Serve with an engine from now on.

        Raises:
            ValueError: if somebody else uses it.
        """
        started = AsyncEngine(engine)
        await started.__aenter__()
        self._async = started
        self._know(engine)

    def tell_stage(self, stage: str) -> None:
        """Say what goes on until there is an engine; any thread may."""
        self._stage = stage

    def _know(self, engine: Engine) -> None:
        self._engine = engine
        engine.logs_text = False  # it is the clients'
        before = engine.on_step

        def both(record: StepRecord) -> None:
            if before is not None:
                before(record)
            self._note(record)

        engine.on_step = both
        self._about = self._describe(engine)
        self._known.set()

    def _describe(self, engine: Engine) -> About:
        intake, ledger = engine.intake, engine.scheduler.ledger
        return About(
            model=intake.model,
            version=VERSION,
            vocab_size=intake.vocab_size,
            max_model_len=intake.max_positions,
            max_request_tokens=ledger.max_request_tokens(),
            num_pages=ledger.num_tokens() // ledger.page_size,
            page_size=ledger.page_size,
            end_token_ids=intake.end_token_ids(),
            keeps_prefixes=ledger.shares,
            tokenizer_dir=self._tokenizer_dir(engine),
        )

    def _tokenizer_dir(self, engine: Engine) -> str | None:
        tokenizer = engine.intake.tokenizer
        if tokenizer is None:
            return None
        if tokenizer.folder is not None:
            return str(tokenizer.folder)
        if not self._saves_tokenizer:
            return None
        self._folder = tempfile.TemporaryDirectory(prefix="mnemosyne-")
        tokenizer.save(Path(self._folder.name))
        return self._folder.name

    async def about(self) -> About:
        await self._known.wait()
        assert self._about is not None, "it is known"
        return self._about

    def status(self) -> Status:
        engine, runner = self._engine, self._async
        if engine is None or runner is None:
            return Status(is_ready=False, stage=self._stage)
        scheduler = engine.scheduler
        age_s, step = runner.heartbeat_age_s, engine.step_in_flight
        limit_s = IDLE_LIMIT_S if step is None else step_limit(step[1], step[0])
        is_alive = runner.failure is None and age_s < limit_s
        return Status(
            is_ready=is_alive,
            stage="ready" if is_alive else "the engine failed",
            heartbeat_age_s=age_s,
            is_alive=is_alive,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            pages_used=scheduler.ledger.num_used,
            num_pages=scheduler.ledger.num_pages,
            backlog_s=self._backlog_s if engine.has_work else 0.0,
            prefill_curve=self._curve,
            counters=self._totals.counters() | scheduler.leaves.counters(),
            tallies=self._totals.tallies(),
        )

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        assert self._async is not None, "jobs come once it is ready"
        self._num_jobs += 1
        try:
            pieces = self._async.submit(PromptIds(job.prompt_ids), job.params, job.given)
            async with aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    yield event_of(piece)
        finally:
            self._num_jobs -= 1

    async def drain(self, timeout_s: float) -> bool:
        end_s = time.monotonic() + timeout_s
        while self._num_jobs and time.monotonic() < end_s:
            await asyncio.sleep(POLL_S)
        is_whole, end_s = not self._num_jobs, time.monotonic() + CANCEL_S
        while self._num_jobs and self._async is not None and time.monotonic() < end_s:
            self._async.cancel()  # again: the prompt of a job may still be on its way
            await asyncio.sleep(POLL_S)
        return is_whole

    async def clear_cache(self) -> int:
        assert self._async is not None, "it is known by now"
        return await self._async.clear_cache()

    def _note(self, record: StepRecord) -> None:
        """Take in a step, in the engine's thread."""
        self._turned_s = time.monotonic()
        self._totals.add(record)
        begun = {request_id for request_id, start, _ in record.chunks if start == 0}
        if begun or self._turned_s - self._looked_s > LOOK_S:
            self._look(begun)

    def _look(self, begun: set[int]) -> None:
        """Look at all requests: what is left to prefill, and what has begun."""
        assert self._engine is not None, "it stepped"
        self._looked_s = self._turned_s
        scheduler, backlog_s, longest = self._engine.scheduler, 0.0, 0
        for output in self._engine.unfinished():
            metrics, total = output.metrics, len(output.prompt_token_ids)
            done = sum(metrics.chunks) + metrics.num_cached
            longest = max(longest, total)
            if done < total:
                backlog_s += scheduler.prefill_s(total) - scheduler.prefill_s(done)
            if output.request_id in begun:
                self._totals.add_request(output.metrics.num_shards or 1)
        self._backlog_s = backlog_s
        lengths = [length for k in range(24) if (length := SHORTEST << k) < 2 * longest]
        self._curve = tuple((length, scheduler.prefill_s(length)) for length in lengths)


def event_of(piece: Piece) -> Event:
    """Turn a piece into the event that the HTTP side is told."""
    return Event(
        piece.sample,
        piece.token_ids,
        piece.text,
        piece.logprobs,
        piece.prompt_logprobs,
        piece.finish_reason,
        piece.stop_reason,
        piece.error,
        piece.prefilled,
        piece.num_prompt_tokens,
        piece.num_cached,
    )
