"""The chunks of prompts in a step, and their sizes: the policy and the chunk rule together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from mnemosyne.config import ScheduleConfig
from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk
from mnemosyne.schedule.draft import ChunkCandidate, StepDraft
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.policy import Policy, relative_slack, slack_s
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.prefill_queue import PrefillQueue
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.request_state import RequestState
from mnemosyne.schedule.spread import Spread
from mnemosyne.schedule.work import StepWork, Work, WorkModel


@dataclass(slots=True)
class Prefills:
    """The prefill part of a step."""

    chunks: list[Chunk]
    prompts: list[RequestState]  # whose they are
    slack_s: list[float]  # of each: time to spare when it was planned
    work: Work  # of the whole step, decodes included
    seconds: float  # predicted, for all of it
    num_handed: int = 0  # rows of slices, by group that they go to


class PrefillPlanner:
    """Orders admitted prompts by the policy and cuts chunks to the predicted time of the step.

    Args:
        config: chunk rule, target time between tokens.
        policy: who goes first.
        predictor: step time; decides sizes only when ``config.chunk`` is "adaptive".
        work_model: counts the work of a chunk.
        spread: lets groups help one another.
        shard_tokens: tokens of one request that a group holds at most.
        depth: steps that may be in flight.
        max_lone_s: that a step of a prompt that nobody waits for may take, if ``target_tbt`` is
            less: a newcomer waits for it.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        policy: Policy,
        predictor: Predictor,
        work_model: WorkModel,
        spread: Spread,
        *,
        shard_tokens: int,
        depth: int,
        max_lone_s: float = inf,
    ) -> None:
        self.config = config
        self.predictor = predictor
        self.work_model = work_model
        self._spread = spread
        self._shard_tokens = shard_tokens
        self._depth = depth
        self._fixed_chunk = config.fixed_chunk
        self._target_s = config.target_tbt_s
        self._max_lone_s = max(max_lone_s, self._target_s)
        self._max_short_tokens = config.max_short_tokens
        self.table = PrefillTable(
            self._alone,
            lambda work: self.predictor.predict(work),
            min_chunk=config.min_chunk,
            max_chunk=config.max_chunk,
            depth=depth,
        )
        self._queue = PrefillQueue(policy, self.table)
        self._num_short = 0  # of those

    def add(self, prompt: RequestState) -> None:
        """Take an admitted prompt in."""
        self._queue.add(prompt)
        self._num_short += prompt.request.num_prompt_tokens <= self._max_short_tokens

    def discard(self, prompt: RequestState) -> None:
        """Forget a prompt that is not planned to its end."""
        self._remove([prompt])

    def clear(self) -> None:
        """Forget all."""
        self._queue.clear()
        self._num_short = 0

    def plan(self, work: Work, now_s: float, *, delays_decodes: bool) -> Prefills:
        """The chunks of a step, beside its decodes; each prompt remembers how far it is planned.

        Args:
            work: of the decodes of the step, by group.
            now_s: seconds on the clock of the requests' arrivals.
            delays_decodes: whether any request decodes, in this step or in others in flight,
                which follow this one through the stages.
        """
        step = StepDraft(work, self.work_model, self.predictor.predict)
        if not self._queue:
            return Prefills([], [], [], work, step.seconds)
        factor = self._queue.follow_table()
        if self._fixed_chunk is not None:
            self._add_fixed(step, self._queue.in_order(now_s, factor), self._fixed_chunk)
        elif len(self._queue) == 1 and not delays_decodes:
            self._add_lone(step, *self._queue.in_order(now_s, factor))
        else:
            self._add_adaptive(step, now_s, factor)
        slacks_s = [slack_s(prompt, now_s, factor) for prompt in step.prompts]
        done = []
        for prompt, chunk in zip(step.prompts, step.chunks, strict=True):
            prompt.num_planned += chunk.num_tokens
            prompt.num_in_flight += 1
            if chunk.samples:
                done.append(prompt)
            else:
                self._queue.advance(prompt)
        self._remove(done)
        parts = step.chunks, step.prompts, slacks_s, tuple(step.work)
        return Prefills(*parts, step.seconds, step.num_handed)

    def _remove(self, prompts: list[RequestState]) -> None:
        self._queue.remove(prompts)
        for prompt in prompts:
            self._num_short -= prompt.request.num_prompt_tokens <= self._max_short_tokens

    def _add_fixed(self, step: StepDraft, order: Iterable[RequestState], budget: int) -> None:
        for prompt in order:
            candidate = ChunkCandidate(step, prompt)
            size = min(budget, candidate.max_tokens)
            self._spread.take(step, candidate, size, total=size, max_chunk=size)
            budget -= size
            if budget == 0:
                break

    def _add_lone(self, step: StepDraft, prompt: RequestState) -> None:
        """Nobody waits for this step but the prompt itself: take the chunk that ends soonest.

        On one stage it is never smaller than beside decodes: where measurements are noisy, small
        chunks may look as fast as large ones, and a step of ``target_tbt`` delays no new arrival
        too long. On several, chunks that take equally long leave no stage idle between them.
        """
        candidate = ChunkCandidate(step, prompt)
        min_chunk, max_chunk = self.config.min_chunk, self.config.max_chunk
        if self._depth > 1:
            length = prompt.request.num_prompt_tokens
            num_groups = 1 + len(self._spread.helpers(prompt, step.group_s))
            where = prompt.num_planned, length, self._max_lone_s
            within_s = self.table.pace(*where, num_groups)
            size = self._solve(candidate, max_chunk, within_s)
        else:
            most, limits = candidate.max_tokens, {"min_chunk": min_chunk, "max_chunk": max_chunk}
            size = solve_lone_chunk(candidate.seconds, remaining=most, **limits)
            size = max(size, self._solve(candidate, max_chunk, self._target_s))
            if candidate.seconds(size) > self._max_lone_s:
                size = self._solve(candidate, max_chunk, self._max_lone_s)
            within_s = min(self._target_s, self._max_lone_s)
        self._spread.take(step, candidate, size or self._least(candidate), within_s=within_s)

    def _add_adaptive(self, step: StepDraft, now_s: float, factor: float) -> None:
        """Chunks in order of the policy until the predicted time of the step is spent.

        At most one long prefill takes part, and while it has slack it leaves a share of the step
        to the short ones behind it. The first prefill gets ``min_chunk`` even when the decodes
        alone spend the step: a prompt that never advances would be worse than a late token.
        """
        num_left, min_chunk = self.config.max_chunk, self.config.min_chunk
        num_short, tried_long = self._num_short, False
        # prompts of other groups may take as long as the decodes of one
        budget_s = max(self._target_s, step.seconds)
        full: set[int] = set()  # groups in which not even the smallest chunk fits any more
        for prompt in self._queue.in_order(now_s, factor):
            is_long = prompt.request.num_prompt_tokens > self._max_short_tokens
            num_short -= not is_long
            if (is_long and tried_long) or (full and prompt.next_group in full):
                continue
            tried_long = tried_long or is_long
            own_s = budget_s
            if is_long and num_short:
                rho = relative_slack(prompt, now_s, factor)
                own_s -= self._given_up_s(rho, budget_s - step.seconds)
            candidate = ChunkCandidate(step, prompt)
            size = self._solve(candidate, num_left, own_s)
            if size == 0 and not step.chunks:
                size = self._least(candidate)
            if size == 0:
                full.add(prompt.next_group)
                if len(full) == len(step.work):
                    break
                continue
            most = self._spread.take(step, candidate, size, within_s=own_s, max_chunk=num_left)
            budget_s = max(budget_s, step.seconds)
            num_left -= most
            if num_left < min_chunk:
                break

    def _least(self, candidate: ChunkCandidate) -> int:
        """Tokens of the smallest chunk."""
        return min(self.config.min_chunk, candidate.max_tokens)

    def _given_up_s(self, rho: float, left_s: float) -> float:
        """The part of a step's time left that a long prefill of this relative slack gives up."""
        return min(max(rho, 0.0), self.config.max_relative_slack) * max(0.0, left_s)

    def _solve(self, candidate: ChunkCandidate, num_left: int, budget_s: float) -> int:
        return solve_chunk(
            candidate.seconds,
            remaining=candidate.max_tokens,
            budget_s=budget_s,
            min_chunk=self.config.min_chunk,
            max_chunk=num_left,
            without_s=candidate.without_s,
        )

    def _alone(self, start: int, num_tokens: int) -> StepWork:
        """A step of one chunk and nothing else, in the group that has most to do."""
        is_shared = start >= self._shard_tokens
        keys = range(self._shard_tokens) if is_shared else None
        return self.work_model.chunk(
            start, num_tokens, samples=False, is_decode=False, keys=keys, is_shared=is_shared
        )
