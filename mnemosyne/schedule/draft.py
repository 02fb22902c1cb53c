"""A step in the making: what one more chunk of prefill would add to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mnemosyne.cache.layout import Placement
from mnemosyne.request import Request
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.work import StepWork, Work, WorkModel


@dataclass(slots=True, eq=False)
class Running:
    """An admitted request, as far as planning needs it: counts, never token values."""

    request: Request
    placement: Placement  # pages for its whole life
    due_s: float  # when its first token is due, on the clock of arrivals
    num_planned: int = 0  # prompt tokens in this and earlier plans
    num_in_flight: int = 0  # steps that hold a chunk of its prompt
    is_released: bool = False

    @property
    def num_remaining(self) -> int:
        """Prompt tokens not yet planned."""
        return self.request.num_prompt_tokens - self.num_planned

    @property
    def next_group(self) -> int:
        """The group that stores the next chunk."""
        return self.placement.shards[self.placement.num_active(self.num_planned + 1) - 1].group

    @property
    def is_prefilling(self) -> bool:
        return self.num_planned < self.request.num_prompt_tokens


class OneMore:
    """A step with the next chunk of one prompt in it, by the size of that chunk.

    Args:
        running: whose chunk it is.
        work: of the step without it, by group.
        model: counts the work of a chunk.
        predict: seconds for the work of one group.

    Attributes:
        most: tokens that the chunk may hold: it never crosses into another shard.
    """

    def __init__(
        self,
        running: Running,
        work: Work,
        model: WorkModel,
        predict: Callable[[StepWork], float],
    ) -> None:
        self._running, self._start, self._before = running, running.num_planned, work
        self._remaining = running.num_remaining
        self._model, self._predict = model, predict
        placement = running.placement
        self.most = min(self._remaining, placement.next_boundary(self._start) - self._start)
        # the shards that compute the chunk, by group
        active = placement.shards[: placement.num_active(self._start + 1)]
        self._shards = {shard.group: index for index, shard in enumerate(active)}
        self._others_s = 0.0
        if len(active) < len(work):
            others = [part for group, part in enumerate(work) if group not in self._shards]
            self._others_s = max(map(predict, others))
        self._known: dict[int, tuple[float, Work]] = {}  # by size: a search asks again

    def seconds(self, num_tokens: int) -> float:
        """Predicted time of the step: that of its slowest group."""
        return self._at(num_tokens)[0]

    def work(self, num_tokens: int) -> Work:
        """The work of the step, by group."""
        return self._at(num_tokens)[1]

    def chunk(self, num_tokens: int) -> Chunk:
        """The chunk itself."""
        samples = num_tokens == self._remaining
        return Chunk(self._running.request.request_id, self._start, num_tokens, samples)

    def _at(self, num_tokens: int) -> tuple[float, Work]:
        found = self._known.get(num_tokens)
        if found is not None:
            return found
        samples, is_shared = num_tokens == self._remaining, len(self._shards) > 1
        seconds, work = self._others_s, list(self._before)
        for group, shard in self._shards.items():
            keys = None  # a lone shard holds all of them
            if is_shared:
                keys = self._running.placement.positions(shard, self._start + num_tokens)
            part = self._model.with_prefill(
                work[group],
                self._start,
                num_tokens,
                samples=samples,
                keys=keys,
                is_shared=is_shared,
            )
            seconds = max(seconds, self._predict(part))
            work[group] = part
        found = self._known[num_tokens] = seconds, tuple(work)
        return found


@dataclass(slots=True, eq=False)
class Draft:
    """The prefill part of a step in the making."""

    work: Work  # of the whole step, decodes included
    rows: list[int] = field(default_factory=list)  # of the table of prompts
    chunks: list[Chunk] = field(default_factory=list)  # of each

    def add(self, row: int, one_more: OneMore, num_tokens: int) -> None:
        """Take the next chunk of the prompt in a row in."""
        self.rows.append(row)
        self.chunks.append(one_more.chunk(num_tokens))
        self.work = one_more.work(num_tokens)
