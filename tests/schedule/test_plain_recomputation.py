"""The scheduler keeps orders, work and decodes up to date; here all is computed anew each step."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.cache.table import PageTable
from mnemosyne.request import Request
from mnemosyne.schedule.chunking import solve_chunk, solve_lone_chunk
from mnemosyne.schedule.plan import Chunk, Plan
from mnemosyne.schedule.scheduler import Scheduler
from tests.schedule.clocked import Rates, make_request, make_scheduler, tokens_of

MACHINE = Rates(1e-3, pair_s=1e-6, key_s=1e-6, step_s=2e-3)
TOKEN = 7
ORDERS = ("fcfs", "edf", "lrs", "lars")  # under which all decodes run in every step
ANYWHERE = PageTable.on(0, np.empty(0, dtype=np.int64))


class Plain:
    """Decisions that the scheduler must make, from lists of requests and what is known of each."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.config = scheduler, scheduler.config
        self.model = scheduler.work_model
        self.waiting: list[Request] = []
        self.running: list[Request] = []  # admitted, in order
        self.due_s: dict[int, float] = {}
        self.done: dict[int, int] = {}  # prompt tokens, by request
        self.ready: list[Chunk] = []

    def plan(self, now_s: float) -> list[Chunk]:
        num_places = self.config.max_sequences - len(self.running)
        for request in self._ordered(self.waiting, now_s)[:num_places]:
            self.waiting.remove(request)
            self.running.append(request)
        chunks, self.ready = self.ready, []
        prompts = [r for r in self.running if self.done[r.request_id] < r.num_prompt_tokens]
        if not self.config.is_adaptive:
            return chunks + self._fixed(self._ordered(prompts, now_s))
        if len(prompts) == 1 and len(self.running) == 1:
            return [self._lone(prompts[0])]
        return self._adaptive(chunks, self._ordered(prompts, now_s), now_s)

    def _ordered(self, requests: list[Request], now_s: float) -> list[Request]:
        return sorted(requests, key=lambda r: (r.priority, self._key(r, now_s)))

    def _key(self, request: Request, now_s: float) -> float:
        match self.config.policy:
            case "fcfs":
                return request.arrival_s
            case "edf":
                return self.due_s[request.request_id]
            case "lrs":
                return self._slack_s(request, now_s)
        return self._relative_slack(request, now_s)

    def _slack_s(self, request: Request, now_s: float) -> float:
        done = self.done[request.request_id]
        total_s, done_s = map(self.scheduler.prefill_s, (request.num_prompt_tokens, done))
        return self.due_s[request.request_id] - now_s - (total_s - done_s)

    def _relative_slack(self, request: Request, now_s: float) -> float:
        total_s = self.scheduler.prefill_s(request.num_prompt_tokens)
        slack_s = self._slack_s(request, now_s)
        if slack_s < 0:
            slack_s -= self.scheduler.prefill_s(self.done[request.request_id])
        return slack_s / total_s

    def step_s(self, chunks: list[Chunk]) -> float:
        work = self.model.nothing
        for chunk in chunks:
            work = self.model.add(work, chunk, ANYWHERE)
        return MACHINE.predict(work[0])

    def _next(self, request: Request, size: int) -> Chunk:
        start = self.done[request.request_id]
        return Chunk(request.request_id, start, size, start + size == request.num_prompt_tokens)

    def _left(self, request: Request) -> int:
        return request.num_prompt_tokens - self.done[request.request_id]

    def _fixed(self, order: list[Request]) -> list[Chunk]:
        chunks, budget = [], int(self.config.chunk)
        for request in order:
            if size := min(budget, self._left(request)):
                chunks.append(self._next(request, size))
                budget -= size
        return chunks

    def _lone(self, request: Request) -> Chunk:
        rule = {
            "remaining": self._left(request),
            "min_chunk": self.config.min_chunk,
            "max_chunk": self.config.max_chunk,
        }

        def predict(size: int) -> float:
            return self.step_s([self._next(request, size)])

        fitting = solve_chunk(predict, budget_s=self.config.target_tbt, **rule)
        return self._next(request, max(solve_lone_chunk(predict, **rule), fitting))

    def _adaptive(self, chunks: list[Chunk], order: list[Request], now_s: float) -> list[Chunk]:
        num_decodes, tried_long, num_left = len(chunks), False, self.config.max_chunk
        budget_s = max(self.config.target_tbt, self.step_s(chunks))
        for index, request in enumerate(order):
            is_long = request.num_prompt_tokens > self.config.long_tokens
            shorts = [r for r in order[index:] if r.num_prompt_tokens <= self.config.long_tokens]
            if is_long and tried_long:
                continue
            tried_long |= is_long
            own_s = budget_s
            if is_long and shorts:
                rho = min(max(self._relative_slack(request, now_s), 0.0), 0.4)
                own_s -= rho * max(0.0, budget_s - self.step_s(chunks))
            size = solve_chunk(
                lambda size, request=request, before=tuple(chunks): self.step_s(
                    [*before, self._next(request, size)]
                ),
                remaining=self._left(request),
                budget_s=own_s,
                min_chunk=self.config.min_chunk,
                max_chunk=num_left,
            )
            if size == 0 and len(chunks) == num_decodes:
                size = min(self.config.min_chunk, self._left(request))
            if size == 0:
                break
            chunks = [*chunks, self._next(request, size)]
            budget_s = max(budget_s, self.step_s(chunks))
            num_left -= size
            if num_left < self.config.min_chunk:
                break
        return chunks

    def note(self, plan: Plan, finished: set[int]) -> None:
        for chunk in plan.chunks:
            if not chunk.is_decode:
                self.done[chunk.request_id] = chunk.stop
            if chunk.samples and chunk.request_id not in finished:
                self.ready.append(Chunk(chunk.request_id, chunk.stop, 1, True, TOKEN))
        self.running = [r for r in self.running if r.request_id not in finished]


def _workload(seed: int) -> list[Request]:
    rng = np.random.default_rng(seed)
    lengths = np.where(
        rng.random(120) < 0.05, rng.integers(300, 900, 120), rng.integers(1, 90, 120)
    )
    return [
        make_request(
            request_id,
            int(length),
            max_tokens=int(rng.integers(1, 12)),
            arrival_s=float(arrival_s),
            priority=int(rng.integers(0, 2)) if seed % 2 else 0,
        )
        for request_id, (length, arrival_s) in enumerate(
            zip(lengths, np.sort(rng.choice([0.0, 0.5, 1.0, 2.5], 120)), strict=True)
        )
    ]


@pytest.mark.parametrize("policy", ORDERS)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("chunk", ["adaptive", 48])
def test_every_decision_is_that_of_a_plain_recomputation(policy, seed, chunk):
    config = {"target_tbt": 0.06, "min_chunk": 8, "max_sequences": 50, "long_tokens": 250}
    scheduler = make_scheduler(MACHINE, policy=policy, chunk=chunk, **config)
    plain, coming, now_s, sampled = Plain(scheduler), _workload(seed), 0.0, {}
    limits = {request.request_id: request.params.max_tokens for request in coming}
    num_steps = 0

    while coming or plain.waiting or plain.running:
        while coming and coming[0].arrival_s <= now_s:
            request = coming.pop(0)
            plain.due_s[request.request_id] = request.arrival_s + scheduler.add(request)
            plain.done[request.request_id] = 0
            plain.waiting.append(request)
        expected = plain.plan(now_s)
        plan = scheduler.plan(now_s)
        if plan is None:
            assert not expected
            now_s = coming[0].arrival_s
            continue

        assert plan.chunks == tuple(expected)
        assert plan.predicted_s == pytest.approx(plain.step_s(expected), rel=1e-12)

        now_s += plan.predicted_s
        scheduler.complete(plan, tokens_of(plan))
        for request_id in tokens_of(plan):
            sampled[request_id] = sampled.get(request_id, 0) + 1
        finished = {i for i in tokens_of(plan) if sampled[i] == limits[i]}
        for request_id in finished:
            scheduler.release(request_id)
        plain.note(plan, finished)
        num_steps += 1

    assert num_steps > 100
    assert sampled == limits
