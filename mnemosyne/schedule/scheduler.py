"""Which requests run in the next step, and how much of each: admission, decodes, chunks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request
from mnemosyne.schedule.plan import Admission, Chunk, Plan
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.prefill import PrefillPlanner, Running
from mnemosyne.schedule.routing import Router
from mnemosyne.schedule.work import StepWork, WorkModel


class Scheduler:
    """Continuous batching: decodes first, then chunks of prefill within the predicted time.

    Pages for prompt and ``max_tokens`` are reserved when a request is admitted, so an admitted
    request always finishes. Requests that do not fit now wait in the order they came.

    Args:
        config: chunk rule, policy, target time between tokens, limits.
        slo: when a first token is due.
        router: places requests on the pages of the cache.
        predictor: step time; decides sizes only when ``config.chunk`` is "adaptive".
        work_model: counts the work of a chunk.
        depth: steps that may be in flight.
    """

    def __init__(
        self,
        config: ScheduleConfig,
        slo: SloConfig,
        *,
        router: Router,
        predictor: Predictor,
        work_model: WorkModel,
        depth: int = 1,
    ) -> None:
        self.config = config
        self.router = router
        self.predictor = predictor
        self.work_model = work_model
        self.depth = depth
        self._prefill = PrefillPlanner(config, slo, predictor, work_model)
        self._waiting: OrderedDict[int, Request] = OrderedDict()
        self._running: OrderedDict[int, Running] = OrderedDict()
        self._released: list[int] = []
        self._works: dict[int, tuple[StepWork, ...]] = {}  # of plans not yet learned from
        self._num_plans = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted time of prefilling a prompt of ``num_tokens`` tokens alone."""
        return self._prefill.table.seconds(0, num_tokens)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that no empty cache could hold.

        Raises:
            ValueError: with the tokens asked, the tokens that fit, and what would help.
        """
        capacity = self.router.max_request_tokens()
        if request.max_tokens > capacity:
            raise ValueError(
                f"prompt and max_tokens must fit the cache of {capacity} tokens, got "
                f"{request.num_prompt_tokens} + {request.params.max_tokens} = "
                f"{request.max_tokens}; shorten one of them or raise cache.max_tokens"
            )

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: if it can never fit.
        """
        self.check_fits(request)
        self._waiting[request.request_id] = request

    def release(self, request_id: int) -> None:
        """Forget a request that finished or was cancelled; its pages are free again.

        Pages of a request that is part of a step in flight are freed when that step is back.
        """
        if self._waiting.pop(request_id, None) is not None:
            return
        running = self._running[request_id]
        running.is_released = True
        if running.num_in_flight == 0:
            self._forget(running)

    def reset(self, lost: Iterable[Plan] = ()) -> None:
        """Forget every request, in whatever state an interruption left them; all pages are free.

        Args:
            lost: plans whose steps are given up; an executor may not have seen what they released.
        """
        for plan in lost:
            self._released += plan.released
        self._released += self._running
        self._waiting.clear()
        self._running.clear()
        self._works.clear()
        self.router.reset()

    def plan(self, now_s: float) -> Plan | None:
        """The next step, or None if nothing can run.

        Args:
            now_s: seconds on the clock of the requests' arrivals.
        """
        admitted = self._admit()
        chunks = self._decode_chunks()
        work = self._work(chunks)
        prefills = [r for r in self._running.values() if r.is_prefilling and not r.is_released]
        chunks += self._prefill.chunks(prefills, work, now_s)
        if not chunks:
            assert not admitted, "an admitted request always has a chunk to compute"
            return None
        for chunk in chunks:
            running = self._running[chunk.request_id]
            running.num_planned = chunk.stop
            running.last_planned = self._num_plans
            running.num_in_flight += 1
        work = self._work(chunks)
        self._works[self._num_plans] = work
        released, self._released = tuple(self._released), []
        self._num_plans += 1
        return Plan(
            index=self._num_plans - 1,
            chunks=tuple(chunks),
            admitted=tuple(admitted),
            released=released,
            predicted_s=self._prefill.step_s(work),
        )

    def complete(self, plan: Plan, tokens: Mapping[int, int]) -> None:
        """Take note that a step is back.

        Args:
            plan: the step.
            tokens: what it sampled, by request; each is one more known token.
        """
        for chunk in plan.chunks:
            running = self._running[chunk.request_id]
            running.num_in_flight -= 1
            if chunk.samples:
                running.num_known += 1
                running.last_token = tokens[chunk.request_id]
            if running.is_released and running.num_in_flight == 0:
                self._forget(running)

    def learn(self, plan: Plan, seconds: float) -> None:
        """Tell the predictor how long a step really took."""
        work = self._works.pop(plan.index)
        self.predictor.observe(max(work, key=self.predictor.predict), seconds)

    def _forget(self, running: Running) -> None:
        request_id = running.request.request_id
        del self._running[request_id]
        self.router.release(running.placement)
        self._released.append(request_id)

    def _admit(self) -> list[Admission]:
        admitted = []
        while self._waiting and len(self._running) < self.config.max_sequences:
            request = next(iter(self._waiting.values()))
            placement = self.router.place(request.max_tokens, self._running.values())
            if placement is None:
                break
            del self._waiting[request.request_id]
            self._running[request.request_id] = self._prefill.start(request, placement)
            admitted.append(
                Admission(
                    request_id=request.request_id,
                    prompt_ids=request.prompt_ids,
                    params=request.params,
                    seed=request.seed,
                    end_token_ids=request.end_token_ids,
                    placement=placement,
                )
            )
        return admitted

    def _decode_chunks(self) -> list[Chunk]:
        """All decodes that are ready; where steps overlap, no more than its share of them.

        Decodes that gathered in one of several steps in flight would all wait for each other.
        """
        decoding = [r for r in self._running.values() if not r.is_prefilling and not r.is_released]
        share = -(-len(decoding) // self.depth)
        ready = [running for running in decoding if running.can_decode]
        ready.sort(key=lambda running: running.last_planned)
        return [self._decode_chunk(running) for running in ready[:share]]

    def _work(self, chunks: list[Chunk]) -> tuple[StepWork, ...]:
        work = self.work_model.nothing
        for chunk in chunks:
            work = self.work_model.add(work, chunk, self._running[chunk.request_id].placement)
        return work

    @staticmethod
    def _decode_chunk(running: Running) -> Chunk:
        return Chunk(
            request_id=running.request.request_id,
            start=running.num_planned,
            num_tokens=1,
            samples=True,
            token_id=running.last_token,
        )
