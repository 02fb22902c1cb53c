"""The real scheduler on a clock that moves by the predicted time of each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.table import PageTable
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.predictor import Predictor
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import StepWork, WorkModel

PAGE_SIZE = 4


class Rates:
    """A machine of constant rates: a predictor that is always right.

    Args:
        token_s: seconds per token.
        pair_s: seconds per query-key pair of prefill.
        key_s: seconds per key that a decode reads.
        step_s: fixed seconds of a step that has anything to do.
    """

    def __init__(
        self, token_s: float = 1e-3, *, pair_s: float = 0.0, key_s: float = 0.0, step_s: float = 0.0
    ) -> None:
        self.token_s, self.pair_s, self.key_s, self.step_s = token_s, pair_s, key_s, step_s

    def predict(self, work: StepWork) -> float:
        return (
            self.step_s * (work.num_tokens > 0)
            + self.token_s * work.num_tokens
            + self.pair_s * work.prefill_pairs
            + self.key_s * work.decode_keys
        )


def make_scheduler(
    predictor: Predictor | None = None,
    *,
    num_pages: Sequence[int] = (100_000,),
    max_tokens_per_group: int | None = None,
    slo: SloConfig | None = None,
    depth: int = 1,
    **config,
) -> Scheduler:
    """A scheduler over groups of so many pages; further names are fields of ScheduleConfig."""
    return Scheduler(
        ScheduleConfig(**config),
        slo or SloConfig(),
        ledger=Ledger(
            num_pages,
            page_size=PAGE_SIZE,
            max_tokens_per_group=max_tokens_per_group or PAGE_SIZE * max(num_pages),
        ),
        predictor=predictor or Rates(),
        work_model=WorkModel([None], len(num_pages)),
        depth=depth,
    )


def make_request(request_id: int, num_prompt_tokens: int, max_tokens: int = 4, **fields) -> Request:
    return Request(
        request_id=request_id,
        prompt_ids=np.zeros(num_prompt_tokens, dtype=np.int64),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        end_token_ids=(),
        **{"arrival_s": 0.0, **fields},
    )


def tokens_of(plan: Plan) -> dict[int, int]:
    """Make up the tokens that a step sampled."""
    return {chunk.request_id: 7 for chunk in plan.chunks if chunk.samples}


@dataclass
class Run:
    """Outcome of a workload. Times in seconds on the clock of arrivals."""

    plans: list[Plan] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)  # of each plan
    admitted: list[int] = field(default_factory=list)
    first_token_s: dict[int, float] = field(default_factory=dict)
    finished_s: dict[int, float] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)  # tokens
    sampled: dict[int, int] = field(default_factory=dict)


def serve(
    scheduler: Scheduler,
    requests: Sequence[Request],
    *,
    max_steps: int = 100_000,
    until_s: float = float("inf"),
) -> Run:
    """Serve requests as they arrive, one step after the other, until nothing is left.

    Raises:
        AssertionError: if a token is computed twice or out of order, if a request is twice in a
            step, if the scheduler has nothing to do while requests wait, or if it is not done
            after ``max_steps``.
    """
    run, view, now_s = Run(), RankView(), 0.0
    coming = sorted(requests, key=lambda request: request.arrival_s)
    known = {request.request_id: request for request in requests}
    for _ in range(max_steps):
        while coming and coming[0].arrival_s <= now_s:
            scheduler.add(coming.pop(0))
        plan = scheduler.plan(now_s)
        if plan is None:
            assert scheduler.num_running == scheduler.num_waiting == 0, "nobody can move"
            if not coming or now_s > until_s:
                return run
            now_s = coming[0].arrival_s
            continue
        ids = [(chunk.request_id, chunk.group) for chunk in plan.chunks]
        assert len(ids) == len(set(ids)), "a request has one chunk in a step, or slices of it"
        view.follow(plan)
        run.plans.append(plan)
        run.started_s.append(now_s)
        run.admitted += [admission.request_id for admission in plan.admitted]
        now_s += plan.predicted_s
        scheduler.complete(plan, tokens_of(plan))
        for chunk in plan.chunks:
            _note(run, chunk, now_s)
            request = known[chunk.request_id]
            if run.sampled.get(request.request_id) == request.params.max_tokens:
                run.finished_s[request.request_id] = now_s
                scheduler.release(request.request_id)
        if now_s > until_s:
            return run
    raise AssertionError(f"not done after {max_steps} steps")


class RankView:
    """Tables as ranks know them from plans, and which keys each lane has."""

    def __init__(self) -> None:
        self.tables: dict[int, PageTable] = {}
        self._known: dict[tuple[int, int], int] = {}  # keys by request and group

    def follow(self, plan: Plan) -> None:
        """Take a plan as ranks do.

        Raises:
            AssertionError: if a slice sees keys that its group lacks, or a page is in two tables.
        """
        for request_id in plan.released:
            self._forget(request_id)
        for request_id, table in plan.tables:
            if any(admission.request_id == request_id for admission in plan.admitted):
                self._forget(request_id)
            self.tables[request_id] = table
        pages = [
            (extent.group, int(page))
            for table in self.tables.values()
            for extent in table.lanes
            for page in extent.pages
        ]
        assert len(pages) == len(set(pages)), "a page is in two tables"
        for chunk in plan.chunks:
            table = self.tables[chunk.request_id]
            for extent in table.lanes if len(table.extents) == 1 else ():
                lane = chunk.request_id, extent.group
                if chunk.group is not None:
                    known = self._known.get(lane, 0)
                    assert known == chunk.start, "a lane has all keys before a slice"
                if chunk.group is not None or extent in table.extents:
                    self._known[lane] = chunk.stop
            if chunk.group is not None:
                assert any(extent.group == chunk.group for extent in table.lanes)

    def _forget(self, request_id: int) -> None:
        table = self.tables.pop(request_id, None)
        for extent in table.lanes if table is not None else ():
            self._known.pop((request_id, extent.group), None)


def _note(run: Run, chunk, now_s: float) -> None:
    request_id = chunk.request_id
    assert chunk.start == run.computed.get(request_id, 0), "tokens come one after the other"
    run.computed[request_id] = chunk.stop
    if chunk.samples:
        run.first_token_s.setdefault(request_id, now_s)
        run.sampled[request_id] = run.sampled.get(request_id, 0) + 1
