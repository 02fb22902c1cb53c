"""Contract between the HTTP side and an engine, wherever that runs: jobs in, events out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from mnemosyne.request import Logprobs, SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """One prompt on its way to the engine; ``params.n`` samples of it.

    Args:
        job_id: unique among those that run; the client's request id leads it.
        prompt_ids: int64 [num_prompt_tokens], checked against the model; nobody changes them.
        params: as the client asked.
        given: tokens that each sample had before its engine died; of no use to the HTTP side.
    """

    job_id: str
    prompt_ids: np.ndarray
    params: SamplingParams
    given: tuple[tuple[int, ...], ...] = ()


class Event(NamedTuple):
    """Progress of one sample since its last event."""

    sample: int  # index below params.n
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[Logprobs, ...] = ()
    # of the whole prompt, None for its first position; once, with the first event that has it
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    finish_reason: str | None = None  # stop, length, cancelled, error; set in the last event
    stop_reason: int | str | None = None  # the end token or stop string that ended it
    error: str | None = None
    prefilled: int = 0  # prompt tokens computed so far, those of the cache included
    num_prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, found in the cache


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """Facts about an engine, known once it can say anything; they never change."""

    model: str  # as the engine was asked for it
    version: str  # of the package
    vocab_size: int
    max_model_len: int  # positions that the model was made for
    max_request_tokens: int  # prompt and output of one request that an empty cache holds
    num_pages: int  # full ones that all groups hold
    page_size: int  # tokens
    end_token_ids: tuple[int, ...] = ()
    keeps_prefixes: bool = False  # whether the cache knows what was prefilled, page by page
    tokenizer_dir: str | None = None  # holds tokenizer.json and the chat template; None: no text


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """A histogram as it stands: counts per bucket, not summed up, the last one without bound."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds
    total: float  # sum of all values


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How an engine is at the moment."""

    is_ready: bool  # takes jobs
    stage: str = ""  # what it does until then, such as "loading weights: 12%"
    heartbeat_age_s: float = 0.0  # since its loop last turned or began to wait for work
    is_alive: bool = True  # the heartbeat is younger than the watchdog's bound
    num_running: int = 0
    num_waiting: int = 0
    pages_used: int = 0
    num_pages: int = 0
    backlog_s: float = 0.0  # predicted time until all that is accepted is prefilled
    # predicted seconds to prefill prompts of some lengths alone, shortest first
    prefill_curve: tuple[tuple[int, float], ...] = ()
    counters: Mapping[str, float] = field(default_factory=dict)  # by name, without mnemosyne_
    tallies: Mapping[str, Tally] = field(default_factory=dict)


class Overloaded(Exception):  # a state that passes, no fault
    """The backend takes no further job now.

    Args:
        reason: for the client.
        retry_after_s: when to try again.
    """

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Backend(Protocol):
    """An engine as the HTTP side sees it; all of it is called on one event loop."""

    async def about(self) -> About:
        """Wait until the model is known, which may be before its weights are there."""
        ...

    def status(self) -> Status:
        """Return at once, whatever the engine does."""
        ...

    def submit(self, job: Job) -> AsyncIterator[Event]:
        """Serve a job.

        Yields:
            Events of its samples, interleaved; the last one of a sample has a ``finish_reason``.
            A slow reader gets what has come meanwhile as one event per sample. Leaving the loop
            early, or closing it, cancels what still runs.

        Raises:
            ValueError: if the job is refused; for the client to read.
            Overloaded: if it would be taken later.
        """
        ...

    async def drain(self, timeout_s: float) -> bool:
        """Wait until no job runs.

        New jobs are the caller's to refuse.

        Returns:
            Whether all ended in time; what did not is cancelled.
        """
        ...

    async def clear_cache(self) -> int:
        """Forget kept prefixes; the number of pages that became free."""
        ...
