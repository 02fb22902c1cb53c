"""Which prompts get chunks in a step, and how large: the policy and the chunk rule together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mnemosyne.cache.layout import Placement
from mnemosyne.config import ScheduleConfig
from mnemosyne.request import Request
from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.policy import POLICIES, Urgency
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.prefill_table import PrefillTable
from mnemosyne.schedule.prompts import LENGTH, Prompts, few_by_few
from mnemosyne.schedule.work import Work, WorkModel


@dataclass(slots=True, eq=False)
class Running:
    """An admitted request, as far as planning needs it: counts, never token values."""

    request: Request
    placement: Placement  # pages for its whole life
    num_planned: int = 0  # tokens in this and earlier plans
    last_token: int | None = None  # the newest that was sampled
    num_in_flight: int = 0  # steps that hold a chunk of it
    is_released: bool = False

    @property
    def num_remaining(self) -> int:
        """Prompt tokens not yet planned."""
        return self.request.num_prompt_tokens - self.num_planned

    @property
    def num_chunkable(self) -> int:
        """Prompt tokens that the next chunk may hold: it never crosses into another shard."""
        boundary = self.placement.next_boundary(self.num_planned)
        return min(self.num_remaining, boundary - self.num_planned)

    @property
    def is_prefilling(self) -> bool:
        return self.num_planned < self.request.num_prompt_tokens


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
        urgency = self.prompts.urgency()
        order = self.prompts.order(urgency, now_s)
        if not self.config.is_adaptive:
            sizes = self._fixed_sizes(order)
        elif len(order) == 1 and not delays_decodes:
            sizes = {0: self._lone_size(self.prompts.items[0])}
        else:
            sizes = self._adaptive_sizes(order, urgency, work, now_s)
        chunks = []
        for row, size in sizes.items():
            running = self.prompts.items[row]
            chunks.append(self._chunk(running, size))
            work = self.work_model.add(work, chunks[-1], running.placement)
        slack_s = urgency.slack_s(now_s)[list(sizes)].tolist()
        self._commit(sizes)
        return Prefills(chunks, slack_s, work)

    def _commit(self, sizes: dict[int, int]) -> None:
        done = []
        for row, size in sizes.items():
            running = self.prompts.items[row]
            running.num_planned += size
            if running.is_prefilling:
                self.prompts.advance(row, running.num_planned)
            else:
                done.append(row)
        self.prompts.drop(done)

    def _fixed_sizes(self, order: np.ndarray) -> dict[int, int]:
        budget = int(self.config.chunk)
        sizes = {}
        for row in few_by_few(order):
            if budget == 0:
                break
            sizes[row] = min(budget, self.prompts.items[row].num_chunkable)
            budget -= sizes[row]
        return sizes

    def _lone_size(self, running: Running) -> int:
        """Nobody waits for this step but the prompt itself: take the chunk that ends soonest.

        It is never smaller than beside decodes: where measurements are noisy, small chunks may
        look as fast as large ones, and a step of ``target_tbt`` delays no new arrival too long.
        """
        predict = self._step_with(running, self.work_model.nothing)
        soonest = solve_lone_chunk(
            predict,
            remaining=running.num_chunkable,
            min_chunk=self.config.min_chunk,
            max_chunk=self.config.max_chunk,
        )
        target_s, max_chunk = self.config.target_tbt, self.config.max_chunk
        return max(soonest, self._solve(predict, running, max_chunk, target_s))

    def _adaptive_sizes(
        self, order: np.ndarray, urgency: Urgency, work: Work, now_s: float
    ) -> dict[int, int]:
        """Chunks in order of the policy until the predicted time of the step is spent.

        At most one long prefill takes part, and while it has slack it leaves a share of the step
        to the short ones behind it. The first prefill gets ``min_chunk`` even when the decodes
        alone spend the step: a prompt that never advances would be worse than a late token.
        """
        sizes: dict[int, int] = {}
        is_long = self.prompts.column(LENGTH) > int(self.config.long_tokens)
        num_short = len(order) - int(np.count_nonzero(is_long))
        num_left, tried_long = self.config.max_chunk, False
        # whatever the decodes of one group take, prompts of others may take as well
        budget_s = max(self.config.target_tbt, self.step_s(work))
        full: set[int] = set()  # groups in which not even the smallest chunk fits any more
        for row in few_by_few(order):
            if num_left < self.config.min_chunk or len(full) == len(work):
                break
            running = self.prompts.items[row]
            num_short -= not is_long[row]
            if (is_long[row] and tried_long) or _group(running) in full:
                continue
            tried_long = tried_long or is_long[row]
            own_s = budget_s
            if is_long[row] and num_short:
                rho = float(urgency.relative_slack(now_s)[row])
                own_s -= self._given_up_s(rho, budget_s, work)
            size = self._solve(self._step_with(running, work), running, num_left, own_s)
            if size == 0 and not sizes:
                size = min(self.config.min_chunk, running.num_chunkable)
            if size == 0:
                full.add(_group(running))
                continue
            sizes[row] = size
            work = self.work_model.add(work, self._chunk(running, size), running.placement)
            budget_s = max(budget_s, self.step_s(work))
            num_left -= size
        return sizes

    def _given_up_s(self, rho: float, budget_s: float, work: Work) -> float:
        """What a long prefill of this relative slack leaves, of the time the step still has."""
        share = min(max(rho, 0.0), self.config.max_relative_slack)
        return share * max(0.0, budget_s - self.step_s(work))

    def _solve(
        self, predict: Callable[[int], float], running: Running, num_left: int, budget_s: float
    ) -> int:
        return solve_chunk(
            predict,
            remaining=running.num_chunkable,
            budget_s=budget_s,
            min_chunk=self.config.min_chunk,
            max_chunk=num_left,
        )

    def _step_with(self, running: Running, work: Work) -> Callable[[int], float]:
        """Predicted time of a step by the size of one more chunk in it."""
        start, placement = running.num_planned, running.placement
        num_active = placement.num_active(start + 1)
        groups = {placement.shards[shard].group: shard for shard in range(num_active)}
        others = [part for group, part in enumerate(work) if group not in groups]
        others_s = max(map(self.predictor.predict, others), default=0.0)
        num_remaining, model, is_alone = running.num_remaining, self.work_model, num_active == 1

        def predict(num_tokens: int) -> float:
            step_s = others_s
            for group, shard in groups.items():
                keys = None if is_alone else placement.positions(shard, start + num_tokens)
                samples = num_tokens == num_remaining
                part = model.with_prefill(
                    *(work[group], start, num_tokens),
                    samples=samples,
                    keys=keys,
                    is_shared=not is_alone,
                )
                step_s = max(step_s, self.predictor.predict(part))
            return step_s

        return predict

    def _alone_s(self, start: int, num_tokens: int) -> float:
        """A step of one chunk and nothing else, in the group that has most to do."""
        is_shared = start >= self._shard_tokens
        keys = range(self._shard_tokens) if is_shared else None
        return self.predictor.predict(
            self.work_model.chunk(
                start, num_tokens, samples=False, is_decode=False, keys=keys, is_shared=is_shared
            )
        )

    @staticmethod
    def _chunk(running: Running, num_tokens: int) -> Chunk:
        return Chunk(
            request_id=running.request.request_id,
            start=running.num_planned,
            num_tokens=num_tokens,
            samples=num_tokens == running.num_remaining,
        )


def _group(running: Running) -> int:
    """The group that stores the next chunk."""
    placement = running.placement
    return placement.shards[placement.num_active(running.num_planned + 1) - 1].group
