"""Plans of steps, as frozen values: they travel to every rank and to the simulator alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, Protocol, Self

import numpy as np

from mnemosyne.cache.table import PageTable
from mnemosyne.request import Logprobs, Request, Sampled, SamplingParams


class Admission(NamedTuple):
    """A request that starts: its prompt, and how to sample."""

    request_id: int
    prompt_ids: np.ndarray  # int64 [num_prompt_tokens], and what is known of the output
    params: SamplingParams  # resolved: no sampling field is None but top-level switches
    seed: int
    end_token_ids: tuple[int, ...]
    num_given: int = 0  # of the ids, those at the end that are output

    @classmethod
    def of(cls, request: Request) -> Self:
        """Reduce a request to what ranks need to know of it."""
        what = request.request_id, request.prompt_ids, request.params
        return cls(*what, request.seed, request.end_token_ids, request.num_given)


class Hit(NamedTuple):
    """The cached part of the prompt of an admitted request."""

    request_id: int
    num_tokens: int  # that need not be computed
    differs_at: int | None = None  # first position where the nearest cached prompt differs
    cached_ids: tuple[int, ...] = ()  # of that one, from that position on


class PageCopy(NamedTuple):
    """Pages of one group whose keys and values other pages of it get; all are read first."""

    group: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]


class SaveFrom(NamedTuple):
    """Neighbouring tokens of a leaf, and the pages of one group that hold them."""

    group: int
    first: int  # token of the leaf
    stop: int
    pages: tuple[int, ...]  # in key order
    offset: int  # slot of the first token, counted from the first of the pages


class Save(NamedTuple):
    """A leaf of a chain that goes to the disk (see ``cache.leaf_file``)."""

    digest: bytes
    before: bytes
    start: int  # position of its first token
    ids: bytes
    sources: tuple[SaveFrom, ...]


class Fetch(NamedTuple):
    """Leaves of an admitted request that ranks begin to read; nothing waits for them."""

    request_id: int
    start: int  # position of the first token of the first leaf
    before: bytes
    digests: tuple[bytes, ...]
    parts: tuple[tuple[str, ...], ...]  # of each, those that the disk has


class Restore(NamedTuple):
    """Leaves that were read and become keys and values of their request."""

    request_id: int
    first: int  # of those fetched
    stop: int
    from_position: int  # what is before it is there already


class Chunk(NamedTuple):
    """A run of one request's tokens computed in one step. A decode is a chunk of one token.

    What a step takes of a prompt may be cut into slices, one after the other, each on a group of
    its own: that group alone computes the rows, and hands their keys and values to the others.

    A tuple, because a step may hold a thousand of them: it is made three times as fast as a
    frozen dataclass, and travels as it is.
    """

    request_id: int
    start: int  # position of the first token
    num_tokens: int
    samples: bool  # the last row is sampled
    token_id: int | None = None  # of a decode: the token to compute, sampled in an earlier step
    group: int | None = None  # of a slice; None: every group that holds its keys computes it

    @classmethod
    def decode(cls, request_id: int, position: int, token_id: int) -> Self:
        """The decode of a token; made directly, as a step that is back brings a thousand."""
        return tuple.__new__(cls, (request_id, position, 1, True, token_id, None))

    @property
    def is_decode(self) -> bool:
        return self.token_id is not None

    @property
    def stop(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: what changed since the last one, then the rows to compute, decodes first."""

    index: int
    chunks: tuple[Chunk, ...]
    admitted: tuple[Admission, ...] = ()
    released: tuple[int, ...] = ()  # requests whose pages are free again
    # page tables that changed, by request: with its admission, or later
    tables: tuple[tuple[int, PageTable], ...] = ()
    copies: tuple[PageCopy, ...] = ()  # in order, before anything is computed
    # to the disk and from it, before anything is computed, in this order
    saves: tuple[Save, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    restores: tuple[Restore, ...] = ()
    predicted_s: float = 0.0
    slack_s: tuple[float, ...] = ()  # of each prefill chunk's request as planned; not sent to ranks
    num_handed: int = 0  # rows of slices, by group that they go to; not sent to ranks
    set_back: tuple[int, ...] = ()  # requests that gave their pages up; not sent to ranks
    hits: tuple[Hit, ...] = ()  # of admitted requests, where prefixes are shared; not sent to ranks

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """How many of the chunks, the first ones, are decodes."""
        # counted from the end: decodes may be a thousand, prefills are few
        is_decode = (index for index, c in enumerate(reversed(self.chunks)) if c.is_decode)
        return len(self.chunks) - next(is_decode, len(self.chunks))


class Handover(NamedTuple):
    """A slice whose keys and values go from its group to another one."""

    chunk: Chunk
    receiver: int
    is_needed: bool  # whether rows of the same step see them there


def handovers(chunks: Iterable[Chunk], table_of: Callable[[int], PageTable]) -> Iterator[Handover]:
    """Tell which slices of a step go where: to every other lane of their prompt.

    Copies are not read any more once a prompt ends: its last slices go to groups of later ones.

    Args:
        chunks: of the step.
        table_of: the table of a request.
    """
    sliced: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        if chunk.group is not None:
            sliced.setdefault(chunk.request_id, []).append(chunk)
    for request_id, slices in sliced.items():
        table = table_of(request_id)
        _check_slices(slices, table)
        lanes = [extent.group for extent in table.lanes]
        for index, chunk in enumerate(slices):
            later = {other.group for other in slices[index + 1 :]}
            readers = later if slices[-1].samples else lanes
            for group in lanes:
                if group != chunk.group and group in readers:
                    yield Handover(chunk, group, group in later)


def _check_slices(slices: list[Chunk], table: PageTable) -> None:
    assert all(a.stop == b.start for a, b in pairwise(slices)), "slices leave no gap"
    groups = [chunk.group for chunk in slices]
    assert len(groups) == len(set(groups)), "a group has one slice of a chunk"
    assert not slices[-1].samples or groups[-1] == table.reporter, "the home has all keys at last"


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a plan."""

    index: int
    sampled: dict[int, Sampled] = field(default_factory=dict)  # by request
    # by request and first position of the chunk
    prompt_logprobs: dict[tuple[int, int], list[Logprobs]] = field(default_factory=dict)
    error: str | None = None  # why the step failed; its requests end with it
    broken: tuple[int, ...] = ()  # requests whose keys or values of this step may not be finite
    restored: dict[int, int] = field(default_factory=dict)  # by request: leaves that were whole


class Executor(Protocol):
    """Runs plans: the model on a mesh, or a clock in the simulator."""

    depth: int  # steps that may be in flight

    def submit(self, plan: Plan) -> None:
        """Start a step."""

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight."""
