"""Which prompts get chunks in a step, and how large: the policy and the chunk rule together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mnemosyne.config import ScheduleConfig
from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk
from mnemosyne.schedule.draft import Draft, OneMore, Running
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.policy import POLICIES, Urgency
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.prompts import LENGTH, Prompts
from mnemosyne.schedule.work import Work, WorkModel


@dataclass(frozen=True, slots=True)
class Prefills:
    """The prefill part of a step."""

    chunks: list[Chunk]
    slack_s: list[float]  # of each: time to spare when it was planned
    work: Work  # of the whole step, decodes included


class PrefillPlanner:
    """Orders admitted prompts by the policy and cuts chunks to the predicted time of the step.

    Args:
        config: chunk rule, policy, target time between tokens.
        predictor: step time; decides sizes only when ``config.chunk`` is "adaptive".
        work_model: counts the work of a chunk.
        shard_tokens: tokens of one request that a group holds at most.
        depth: steps that may be in flight.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        predictor: Predictor,
        work_model: WorkModel,
        *,
        shard_tokens: int,
        depth: int,
    ) -> None:
        self.config = config
        self.predictor = predictor
        self.work_model = work_model
        self._shard_tokens = shard_tokens
        self.table = PrefillTable(
            self._alone_s, min_chunk=config.min_chunk, max_chunk=config.max_chunk, depth=depth
        )
        self.prompts: Prompts[Running] = Prompts(POLICIES[config.policy], self.table)

    def step_s(self, work: Work) -> float:
        """Predicted time of a step: that of its slowest group."""
        return max(map(self.predictor.predict, work))

    def plan(self, work: Work, now_s: float, *, delays_decodes: bool) -> Prefills:
        """The chunks of a step, beside its decodes; each prompt remembers how far it is planned.

        Args:
            work: of the decodes of the step, by group.
            now_s: seconds on the clock of the requests' arrivals.
            delays_decodes: whether any request decodes, in this step or in others in flight,
                which follow this one through the stages.
        """
        if not self.prompts:
            return Prefills([], [], work)
        step, urgency = Draft(work), self.prompts.urgency(now_s)
        if not self.config.is_adaptive:
            self._add_fixed(step, self.prompts.in_order(urgency))
        elif len(self.prompts) == 1 and not delays_decodes:
            self._add_lone(step)
        else:
            self._add_adaptive(step, urgency)
        slack_s = urgency.slack_s[step.rows].tolist()
        self._commit(step)
        return Prefills(step.chunks, slack_s, step.work)

    def _commit(self, step: Draft) -> None:
        done = []
        for row, chunk in zip(step.rows, step.chunks, strict=True):
            self.prompts.items[row].num_planned = chunk.stop
            if chunk.samples:
                done.append(row)
            else:
                self.prompts.advance(row, chunk.stop)
        self.prompts.drop(done)

    def _add_fixed(self, step: Draft, order: Iterator[int]) -> None:
        budget = int(self.config.chunk)
        for row in order:
            one_more = self._one_more(row, step)
            size = min(budget, one_more.most)
            step.add(row, one_more, size)
            budget -= size
            if budget == 0:
                break

    def _add_lone(self, step: Draft) -> None:
        """Nobody waits for this step but the prompt itself: take the chunk that ends soonest.

        It is never smaller than beside decodes: where measurements are noisy, small chunks may
        look as fast as large ones, and a step of ``target_tbt`` delays no new arrival too long.
        """
        one_more = self._one_more(0, step)
        soonest = solve_lone_chunk(
            one_more.seconds,
            remaining=one_more.most,
            min_chunk=self.config.min_chunk,
            max_chunk=self.config.max_chunk,
        )
        target_s, max_chunk = float(self.config.target_tbt), self.config.max_chunk
        size = max(soonest, self._solve(one_more, max_chunk, target_s))
        step.add(0, one_more, size)

    def _add_adaptive(self, step: Draft, urgency: Urgency) -> None:
        """Chunks in order of the policy until the predicted time of the step is spent.

        At most one long prefill takes part, and while it has slack it leaves a share of the step
        to the short ones behind it. The first prefill gets ``min_chunk`` even when the decodes
        alone spend the step: a prompt that never advances would be worse than a late token.
        """
        long_tokens = int(self.config.long_tokens)
        num_short = int(np.count_nonzero(self.prompts.column(LENGTH) <= long_tokens))
        num_left, tried_long = self.config.max_chunk, False
        # whatever the decodes of one group take, prompts of others may take as well
        budget_s = max(float(self.config.target_tbt), self.step_s(step.work))
        full: set[int] = set()  # groups in which not even the smallest chunk fits any more
        for row in self.prompts.in_order(urgency):
            if num_left < self.config.min_chunk or len(full) == len(step.work):
                break
            running = self.prompts.items[row]
            is_long = running.request.num_prompt_tokens > long_tokens
            num_short -= not is_long
            if (is_long and tried_long) or (full and running.next_group in full):
                continue
            tried_long = tried_long or is_long
            own_s = budget_s
            if is_long and num_short:
                rho = float(urgency.relative_slack(row))
                own_s -= self._given_up_s(rho, budget_s, step.work)
            one_more = self._one_more(row, step)
            size = self._solve(one_more, num_left, own_s)
            if size == 0 and not step.rows:
                size = min(self.config.min_chunk, one_more.most)
            if size == 0:
                full.add(running.next_group)
                continue
            step.add(row, one_more, size)
            budget_s = max(budget_s, one_more.seconds(size))
            num_left -= size

    def _given_up_s(self, rho: float, budget_s: float, work: Work) -> float:
        """What a long prefill of this relative slack leaves, of the time the step still has."""
        share = min(max(rho, 0.0), self.config.max_relative_slack)
        return share * max(0.0, budget_s - self.step_s(work))

    def _solve(self, one_more: OneMore, num_left: int, budget_s: float) -> int:
        return solve_chunk(
            one_more.seconds,
            remaining=one_more.most,
            budget_s=budget_s,
            min_chunk=self.config.min_chunk,
            max_chunk=num_left,
        )

    def _one_more(self, row: int, step: Draft) -> OneMore:
        return OneMore(self.prompts.items[row], step.work, self.work_model, self.predictor.predict)

    def _alone_s(self, start: int, num_tokens: int) -> float:
        """A step of one chunk and nothing else, in the group that has most to do."""
        is_shared = start >= self._shard_tokens
        keys = range(self._shard_tokens) if is_shared else None
        return self.predictor.predict(
            self.work_model.chunk(
                start, num_tokens, samples=False, is_decode=False, keys=keys, is_shared=is_shared
            )
        )
