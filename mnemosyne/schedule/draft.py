"""A step in the making, and what one more chunk of prefill would add to it."""

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
    """

    def __init__(self, work: Work, model: WorkModel, predict: Callable[[StepWork], float]) -> None:
        self.work = list(work)
        self.model, self.predict = model, predict
        self.group_s = [predict(part) for part in work]
        self.seconds = max(self.group_s)
        self.chunks: list[Chunk] = []
        self.prompts: list[RequestState] = []


class ChunkCandidate:
    """A step with the next chunk of one prompt in it, by the size of that chunk.

    Args:
        step: without it.
        prompt: whose chunk it is.

    Attributes:
        max_tokens: tokens that the chunk may hold: it never crosses into another extent.
        without_s: predicted time of the step without it.
    """

    def __init__(self, step: StepDraft, prompt: RequestState) -> None:
        self._step, self._prompt, self._start = step, prompt, prompt.num_planned
        self.without_s = step.seconds
        self.max_tokens = self._remaining = prompt.request.num_prompt_tokens - self._start
        self._active = extents = prompt.table.extents  # that compute the chunk
        if len(extents) > 1:
            until_boundary = prompt.table.next_start(self._start) - self._start
            self.max_tokens = min(self.max_tokens, until_boundary)
            self._active = extents[: prompt.table.num_holding(self._start + 1)]
        self._others_s = 0.0
        if len(self._active) < len(step.work):
            groups = {extent.group for extent in self._active}
            self._others_s = max(s for group, s in enumerate(step.group_s) if group not in groups)
        self._size = 0  # that the parts are for

    def seconds(self, num_tokens: int) -> float:
        """Predicted time of the step: that of its slowest group."""
        step, active, slowest_s, keys = self._step, self._active, self._others_s, None
        samples = num_tokens == self._remaining
        self._size, self._parts = num_tokens, []
        for index, extent in enumerate(active):
            if len(active) > 1:  # a lone one holds all keys
                keys = self._prompt.table.positions(index, self._start + num_tokens)
            part = step.work[extent.group]
            part = step.model.with_prefill(part, self._start, num_tokens, samples, keys)
            part_s = step.predict(part)
            self._parts.append((extent.group, part, part_s))
            if part_s > slowest_s:
                slowest_s = part_s
        return slowest_s

    def accept(self, num_tokens: int) -> None:
        """Make it part of the step, with a chunk of so many tokens."""
        if self._size != num_tokens:
            self.seconds(num_tokens)
        step, request_id = self._step, self._prompt.request.request_id
        for group, part, part_s in self._parts:
            step.work[group], step.group_s[group] = part, part_s
        step.seconds = max(step.group_s)
        samples = num_tokens == self._remaining
        step.chunks.append(Chunk(request_id, self._start, num_tokens, samples))
        step.prompts.append(self._prompt)
