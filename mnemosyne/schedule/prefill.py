"""Which prompts get chunks in a step, and how large: the policy and the chunk rule together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mnemosyne.cache.layout import Placement
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk
from mnemosyne.schedule.plan import Chunk
from mnemosyne.schedule.policy import POLICIES, PrefillTable, Urgency
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.work import StepWork, WorkModel

Work = tuple[StepWork, ...]  # of a step, by group


@dataclass(slots=True, eq=False)
class Running:
    """An admitted request, as far as planning needs it: counts, never token values."""

    request: Request
    placement: Placement  # pages for its whole life
    total_s: float  # predicted time of its prefill, alone
    deadline_s: float  # for its first token, after arrival
    num_planned: int = 0  # tokens in this and earlier plans
    num_known: int = 0  # prompt and output tokens that exist
    last_token: int | None = None  # the newest of them, once one was sampled
    num_in_flight: int = 0  # steps that hold a chunk of it
    last_planned: int = 0  # index of the newest of them
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

    @property
    def can_decode(self) -> bool:
        return not self.is_prefilling and self.num_planned < self.num_known


class PrefillPlanner:
    """Orders prompts by the policy and cuts chunks to the predicted time of the step.

    Args:
        config: chunk rule, policy, target time between tokens.
        slo: when a first token is due.
        predictor: step time; decides sizes only when ``config.chunk`` is "adaptive".
        work_model: counts the work of a chunk.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        slo: SloConfig,
        predictor: Predictor,
        work_model: WorkModel,
    ) -> None:
        self.config = config
        self.slo = slo
        self.predictor = predictor
        self.work_model = work_model
        self._policy = POLICIES[config.policy]
        self.table = PrefillTable(
            self._prefill_step_s, min_chunk=config.min_chunk, max_chunk=config.max_chunk
        )

    def step_s(self, work: Work) -> float:
        """Predicted time of a step: that of its slowest group."""
        return max(self.predictor.predict(part) for part in work)

    def start(self, request: Request, placement: Placement) -> Running:
        """A request as it is admitted, with its predicted work and its deadline."""
        total_s = self.table.seconds(0, request.num_prompt_tokens)
        deadline_s = request.deadline_s
        if deadline_s is None:
            deadline_s = max(self.slo.ttft_min, self.slo.ttft_scale * total_s)
        return Running(
            request,
            placement,
            total_s=total_s,
            deadline_s=deadline_s,
            num_known=request.num_prompt_tokens,
        )

    def chunks(self, prefills: list[Running], decode_work: Work, now_s: float) -> Iterable[Chunk]:
        """The chunks of a step, beside its decodes.

        Args:
            prefills: admitted requests whose prompts are not all planned.
            decode_work: of the decodes of the step, by group.
            now_s: seconds on the clock of the requests' arrivals.
        """
        if len(prefills) > 1:
            prefills = sorted(prefills, key=lambda running: self._rank(running, now_s))
        if not self.config.is_adaptive:
            return self._fixed_chunks(prefills)
        if len(prefills) == 1 and decode_work == self.work_model.nothing:
            return [self._lone_chunk(prefills[0])]
        return self._adaptive_chunks(prefills, decode_work, now_s)

    def _rank(self, running: Running, now_s: float) -> tuple[int, float, int]:
        urgency = self._policy(self._urgency(running), now_s)
        return running.request.priority, urgency, running.request.request_id

    def _urgency(self, running: Running) -> Urgency:
        return Urgency(
            arrival_s=running.request.arrival_s,
            deadline_s=running.deadline_s,
            total_s=running.total_s,
            remaining_s=self.table.seconds(running.num_planned, running.request.num_prompt_tokens),
        )

    def _fixed_chunks(self, prefills: list[Running]) -> Iterable[Chunk]:
        budget = int(self.config.chunk)
        chunks = []
        for running in prefills:
            if budget == 0:
                break
            chunk = self._chunk(running, min(budget, running.num_chunkable))
            budget -= chunk.num_tokens
            chunks.append(chunk)
        return chunks

    def _lone_chunk(self, running: Running) -> Chunk:
        """Nobody waits for this step but the prompt itself: take the chunk that ends soonest.

        It is never smaller than beside decodes: where measurements are noisy, small chunks may
        look as fast as large ones, and a step of ``target_tbt`` delays no new arrival too long.
        """
        limits = {"min_chunk": self.config.min_chunk, "max_chunk": self.config.max_chunk}
        soonest = solve_lone_chunk(
            lambda num_tokens: self._prefill_step_s(running.num_planned, num_tokens),
            remaining=running.num_chunkable,
            **limits,
        )
        within_target = self._solve(
            running, self.work_model.nothing, self.config.max_chunk, self.config.target_tbt
        )
        return self._chunk(running, max(soonest, within_target))

    def _adaptive_chunks(
        self, prefills: list[Running], work: Work, now_s: float
    ) -> Iterable[Chunk]:
        """Chunks in order of the policy until the predicted time of the step is spent.

        At most one long prefill takes part, and while it has slack it leaves a share of the step
        to the short ones behind it. The first prefill gets ``min_chunk`` even when the decodes
        alone spend the step: a prompt that never advances would be worse than a late token.
        """
        chunks: list[Chunk] = []
        num_left, has_long = self.config.max_chunk, False
        for index, running in enumerate(prefills):
            is_long = running.request.num_prompt_tokens > int(self.config.long_tokens)
            if num_left < self.config.min_chunk or (is_long and has_long):
                continue
            budget_s = self.config.target_tbt
            if is_long and index + 1 < len(prefills):
                budget_s -= self._given_up_s(running, budget_s, work, now_s)
            size = self._solve(running, work, num_left, budget_s)
            if size == 0 and not chunks:
                size = min(self.config.min_chunk, running.num_chunkable)
            if size == 0:
                continue
            chunk = self._chunk(running, size)
            work = self.work_model.add(work, chunk, running.placement)
            chunks.append(chunk)
            num_left -= size
            has_long = has_long or is_long
        return chunks

    def _given_up_s(self, running: Running, budget_s: float, work: Work, now_s: float) -> float:
        """What a long prefill with slack leaves to others, of the time the step still has."""
        slack = self._urgency(running).relative_slack(now_s)
        share = min(max(slack, 0.0), self.config.max_relative_slack)
        return share * max(0.0, budget_s - self.step_s(work))

    def _solve(self, running: Running, work: Work, num_left: int, budget_s: float) -> int:
        def predict(num_tokens: int) -> float:
            chunk = self._chunk(running, num_tokens)
            return self.step_s(self.work_model.add(work, chunk, running.placement))

        return solve_chunk(
            predict,
            remaining=running.num_chunkable,
            budget_s=budget_s,
            min_chunk=self.config.min_chunk,
            max_chunk=num_left,
        )

    def _prefill_step_s(self, start: int, num_tokens: int) -> float:
        """Predicted time of a step that holds one chunk and nothing else."""
        work = self.work_model.chunk(start, num_tokens, samples=False, is_decode=False)
        return self.predictor.predict(work)

    @staticmethod
    def _chunk(running: Running, num_tokens: int) -> Chunk:
        return Chunk(
            request_id=running.request.request_id,
            start=running.num_planned,
            num_tokens=num_tokens,
            samples=num_tokens == running.num_remaining,
        )
