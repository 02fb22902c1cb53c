"""One job as the front keeps it: what came of it so far, what its reader has not read yet."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field, replace

from mnemosyne.request import NUM_SEEDS, SamplingParams
from mnemosyne.serve.unread import Unread
from mnemosyne.server.backend import About, Event, Job

PROOF_TOKENS = 2  # new ones that a request must get to be cleared: of its prefill and a decode


@dataclass(slots=True, eq=False)
class Task:
    """A job between its submission and its last event.

    Args:
        number: on the link.
        job: as it was asked for.
        params: the same with a seed and a limit, so that it can go on elsewhere.
    """

    number: int
    job: Job
    params: SamplingParams
    tokens: list[list[int]] = field(init=False)  # of each sample, all that came
    num_tokens: int = field(init=False)  # of all of them
    ends: set[int] = field(default_factory=set)  # samples that are at their end
    is_given: bool = False  # to the engine that runs now
    num_deaths: int = 0  # of engines, since it last got further
    num_before: int = 0  # tokens that it had when the last of them died
    further: asyncio.Event = field(default_factory=asyncio.Event)  # it got on, or ended
    error: Exception | None = None  # what its reader is to be told in place of further events
    _unread: Unread[Event] = field(default_factory=Unread)  # by sample
    _has_event: bool = False
    _reader: asyncio.Future[None] | None = None  # which waits for an event

    def __post_init__(self) -> None:
        given = self.job.given or ((),) * self.job.params.n
        self.tokens = [list(ids) for ids in given]
        self.num_tokens = sum(map(len, given))

    @property
    def is_ended(self) -> bool:
        return len(self.ends) == self.job.params.n

    @property
    def num_to_compute(self) -> int:
        """Tokens that an engine has to prefill before it goes on."""
        num_running = self.job.params.n - len(self.ends)
        return num_running * len(self.job.prompt_ids) + self.num_tokens

    def given(self) -> tuple[tuple[int, ...] | None, ...]:
        """List what each sample has, as an engine is told."""
        return tuple(None if i in self.ends else tuple(ids) for i, ids in enumerate(self.tokens))

    def enter(self, event: Event) -> None:
        """Take an event; one of a sample that is at its end, or that nobody asked for, is none."""
        sample, ids = event.sample, event.token_ids
        if not 0 <= sample < self.job.params.n or sample in self.ends:
            return
        self.tokens[sample] += ids
        self.num_tokens += len(ids)
        if event.finish_reason is not None:
            self.ends.add(sample)
        if not self.further.is_set() and (
            self.is_ended or self.num_tokens >= self.num_before + PROOF_TOKENS
        ):
            self.num_deaths = 0
            self.further.set()
        self._unread.add(sample, event)
        self._wake_reader()

    def _wake_reader(self) -> None:
        self._has_event = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def note_death(self, *, counts: bool = True) -> None:
        """The engine that had it died; ``counts``: perhaps through it."""
        self.is_given = False
        self.num_deaths += counts
        self.num_before = self.num_tokens
        self.further.clear()

    def fail(self, reason: str) -> None:
        """End what still runs of it with an error, after what it has."""
        for sample in range(self.job.params.n):
            self.enter(Event(sample, finish_reason="error", error=reason))

    def refuse(self, error: Exception) -> None:
        """Have its reader get an exception."""
        self.error = error
        self.further.set()
        self._wake_reader()

    async def events(self) -> list[Event]:
        """Wait for events; what has come since the last call, one per sample; for one reader.

        Raises:
            Exception: that it was refused with.
        """
        if not self._has_event:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        self._has_event = False
        if self.error is not None:
            raise self.error
        return self._unread.take()


def completed(job: Job, about: About) -> SamplingParams:
    """The parameters of a job with all that an engine would choose for itself."""
    params = job.params
    if params.max_tokens is None:
        room = min(about.max_model_len, about.max_request_tokens) - len(job.prompt_ids)
        params = replace(params, max_tokens=max(1, room, params.min_tokens))
    if params.seed is None:
        params = replace(params, seed=secrets.randbelow(NUM_SEEDS))
    return params
