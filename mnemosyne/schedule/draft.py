"""A step in the making, and the time that one more chunk of prefill would add to it."""

from __future__ import annotations

from collections.abc import Callable

from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.work import StepWork, Work, WorkModel


class StepDraft:
    """A step in the making: its decodes, and the chunks of prefill so far.

    Args:
        work: of the decodes, by group.
        model: counts the work of a chunk.
        predict: seconds for the work of one group.

    Attributes:
        work: of the whole step, by group.
        seconds: predicted, of the slowest group.
        chunks: of prefill.
        prompts: whose they are.
        num_handed: rows of slices, by group that they go to.
    """

    def __init__(self, work: Work, model: WorkModel, predict: Callable[[StepWork], float]) -> None:
        self.work = list(work)
        self.model, self.predict = model, predict
        self.group_s = [predict(part) for part in work]
        self.seconds = max(self.group_s)
        self.chunks: list[Chunk] = []
        self.prompts: list[RequestState] = []
        self.num_handed = 0


class ChunkCandidate:
    """A step with the next chunk of one prompt in it, or a slice, by the size of it.

    Args:
        step: without it.
        prompt: whose chunk it is.
        start: its first position; unset: the next one of the prompt.
        group: of a slice, which this group computes alone.

    Attributes:
        max_tokens: tokens that the chunk may hold: it never crosses into another extent.
        without_s: predicted time of the step without it.
    """

    def __init__(
        self,
        step: StepDraft,
        prompt: RequestState,
        start: int | None = None,
        group: int | None = None,
    ) -> None:
        self.prompt = prompt
        self._step, self._group = step, group
        self._start = prompt.num_planned if start is None else start
        self.without_s = step.seconds
        self.max_tokens = self._remaining = prompt.request.num_prompt_tokens - self._start
        active = prompt.table.extents  # that compute the chunk
        if len(active) > 1:
            until_boundary = prompt.table.next_start(self._start) - self._start
            self.max_tokens = min(self.max_tokens, until_boundary)
            active = active[: prompt.table.num_holding(self._start + 1)]
        groups = [extent.group for extent in active] if group is None else [group]
        self._groups = groups  # that compute it
        self._others_s = 0.0
        if len(groups) < len(step.work):
            self._others_s = max(s for group, s in enumerate(step.group_s) if group not in groups)
        self._size = 0  # that the parts are for

    def seconds(self, num_tokens: int) -> float:
        """Predicted time of the step: that of its slowest group."""
        return max(self._others_s, self.own_seconds(num_tokens))

    def own_seconds(self, num_tokens: int) -> float:
        """Predicted time of the groups that compute it."""
        step, slowest_s, keys = self._step, 0.0, None
        samples = num_tokens == self._remaining
        self._size, self._parts = num_tokens, []
        for index, group in enumerate(self._groups):
            if len(self._groups) > 1:  # a lone one holds all keys
                keys = self.prompt.table.positions(index, self._start + num_tokens)
            part = step.model.with_prefill(step.work[group], self._start, num_tokens, samples, keys)
            part_s = step.predict(part)
            self._parts.append((group, part, part_s))
            slowest_s = max(slowest_s, part_s)
        return slowest_s

    def accept(self, num_tokens: int) -> None:
        """Make it part of the step, with this many tokens."""
        if self._size != num_tokens:
            self.own_seconds(num_tokens)
        step, request_id = self._step, self.prompt.request.request_id
        for group, part, part_s in self._parts:
            step.work[group], step.group_s[group] = part, part_s
        step.seconds = max(step.group_s)
        samples = num_tokens == self._remaining
        chunk = Chunk(request_id, self._start, num_tokens, samples, group=self._group)
        step.chunks.append(chunk)
        step.prompts.append(self.prompt)
