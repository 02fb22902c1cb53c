"""Compare plans of random workloads before and after a change to the scheduler.

Save the plans before a change and compare after it. No model and no rank runs: steps take what a
made-up machine needs for them, and the predictor learns from that. Workloads differ in policy,
chunk rule, groups, pages, windows, stages, lengths, arrivals, priorities and deadlines; in some
prompts share their beginnings, in some outputs grow whose end is not known, and some requests are
cancelled on the way. All follows from the number of the workload.

Compared are, of every plan, the chunks, the groups and pages of who is admitted or grew, who is
released or set back, and what was cached, exactly; predicted times to nine digits.

Usage: python tools/compare_plans.py save FILE [--workloads 40]
       python tools/compare_plans.py check FILE
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from math import isclose
from typing import Any

import numpy as np

from mnemosyne.cache.table import PageTable
from mnemosyne.config import ScheduleConfig, SloConfig
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.plan import Plan
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import StepWork, WorkModel

COSTS = np.array([2e-3, 1e-5, 3e-9, 2e-8, 1e-4, 2e-4, 5e-6, 2e-2])  # seconds per feature
NOISE = 0.05  # standard deviation of the logarithm of a step's time
ORDERS = ("fcfs", "edf", "lrs", "lars")  # as ever: the workloads of one number stay the same
CANCELLED = 0.03  # share of the requests
SOME = 0.4  # share of the workloads that share, and that grow; of the requests that grow
NUM_STEMS = 4  # beginnings of prompts
EXPECTED_TOKENS = 32  # of outputs whose end is not known: most are longer
EXACT = ("chunks", "admitted", "released", "set_back", "hits")
MOST_EVENTS = 20_000  # of one workload: plans, and steps that are back
DIGITS = 1e-9

Entry = dict[str, Any]  # what is compared of one plan


class Workload:
    """Requests of one kind of service, and a scheduler for them.

    Args:
        number: everything about it follows from this.
    """

    def __init__(self, number: int) -> None:
        self._rng = rng = np.random.default_rng(number)
        # drawn apart, so that the rest is the same with and without them
        self._extra = extra = np.random.default_rng([number, 1])
        self._shares, self._grows = (bool(extra.random() < SOME) for _ in range(2))
        self.depth = int(rng.choice([1, 1, 2, 4]))
        num_groups, page_size = int(rng.choice([1, 1, 2, 3])), int(rng.choice([4, 16, 128]))
        self._longest = int(rng.choice([500, 5_000, 40_000]))
        num_pages = (
            -(-int(self._longest * float(np.exp(rng.uniform(0.4, 4)))) // page_size // num_groups)
            + 4
        )
        per_group = -(-self._longest // num_groups // page_size) + 2
        windows = [[None], [None, 256], [64, 64, None]][int(rng.integers(3))]
        self._model = WorkModel(windows, num_groups)
        self.scheduler = self._scheduler(num_groups, num_pages, page_size, per_group * page_size)
        self._coming = self._requests(int(rng.integers(60, 400)))
        self._left = {r.request_id: self._num_output(r) for r in self._coming}
        self._cancelled = {i for i in self._left if rng.random() < CANCELLED}

    def _scheduler(
        self, num_groups: int, num_pages: int, page_size: int, max_tokens_per_group: int
    ) -> Scheduler:
        rng, predictor = self._rng, LinearPredictor()
        if rng.random() < 0.8:
            predictor.fit([(work, _seconds(work)) for work in _sweep(self._model)])
        config = ScheduleConfig(
            chunk="adaptive" if rng.random() < 0.75 else int(rng.choice([64, 256, 2048])),
            target_tbt=float(rng.choice([0.01, 0.05, 0.2])),
            min_chunk=int(rng.choice([1, 32, 50])),
            max_chunk=int(rng.choice([512, 8192])),
            max_sequences=int(rng.choice([4, 32, 200])),
            policy=str(rng.choice(ORDERS)),
            long_tokens=int(rng.choice([200, 2_000, 32_768])),
            expected_tokens=EXPECTED_TOKENS,
        )
        return build_scheduler(
            config,
            SloConfig(ttft_min=0.05),
            num_groups=num_groups,
            num_pages=num_pages,
            page_size=page_size,
            max_tokens_per_group=min(max_tokens_per_group, num_pages * page_size),
            predictor=predictor,
            work_model=self._model,
            depth=self.depth,
            fingerprint=b"plans" if self._shares else None,
        )

    def _num_output(self, request: Request) -> int:
        """Tokens after which a request ends; no end was told of those that grow."""
        room = request.max_tokens - request.num_prompt_tokens
        return min(room, int(self._extra.integers(1, 200))) if request.is_open else room

    def _prompt(self, length: int) -> np.ndarray:
        """Ids of a prompt; where prompts share, a part of one of a few beginnings comes first."""
        if not self._shares:
            return np.zeros(length, dtype=np.int64)
        stem = np.random.default_rng(int(self._extra.integers(NUM_STEMS))).integers(0, 1000, length)
        num_own = int(self._extra.integers(length))
        stem[length - num_own :] = self._extra.integers(0, 1000, num_own)
        return stem

    def _requests(self, count: int) -> deque[Request]:
        rng = self._rng
        lengths = np.exp(rng.uniform(0, np.log(self._longest * 0.9), count)).astype(int)
        gaps = rng.exponential(float(rng.choice([0.0005, 0.005, 0.05])), count)
        num_classes = int(rng.choice([1, 1, 3]))
        is_open = [self._grows and self._extra.random() < SOME for _ in range(count)]
        room = self.scheduler.ledger.max_request_tokens()
        return deque(
            Request(
                request_id=request_id,
                prompt_ids=self._prompt(length),
                params=_params(int(rng.integers(1, 200)), room - length, is_open[request_id]),
                seed=0,
                end_token_ids=(),
                arrival_s=float(arrival_s),
                priority=int(rng.integers(num_classes)),
                deadline_s=float(rng.uniform(0.01, 5)) if rng.random() < 0.3 else None,
                is_open=is_open[request_id] and length < room,
            )
            for request_id, (length, arrival_s) in enumerate(
                zip(lengths.tolist(), gaps.cumsum(), strict=True)
            )
        )

    def plans(self) -> Iterator[Plan]:
        """The plans of the whole workload, in order."""
        now_s, in_flight = 0.0, deque[Plan]()
        for _ in range(MOST_EVENTS):
            self._accept(now_s)
            plan = self.scheduler.plan(now_s) if len(in_flight) < self.depth else None
            if plan is not None:
                yield plan
                in_flight.append(plan)
            elif in_flight:
                now_s += self._finish(in_flight.popleft())
            elif self._coming:
                now_s = max(now_s, self._coming[0].arrival_s)
            else:
                return

    def _accept(self, now_s: float) -> None:
        while self._coming and self._coming[0].arrival_s <= now_s:
            request = self._coming.popleft()
            try:
                self.scheduler.add(request)
            except ValueError:  # it fits no empty cache
                del self._left[request.request_id]

    def _finish(self, plan: Plan) -> float:
        """Take a step back; seconds that it took."""
        noise = float(np.exp(NOISE * self._rng.standard_normal()))
        seconds = noise * (1e-3 + plan.num_tokens * 1e-5) / self.depth
        ids = [chunk.request_id for chunk in plan.chunks]
        sampled = [chunk.request_id for chunk in plan.chunks if chunk.samples]
        self.scheduler.complete(plan, dict.fromkeys(sampled, 7))
        self.scheduler.learn(plan, seconds)
        for request_id in sampled:
            if request_id in self._left:
                self._left[request_id] -= 1
        done = [i for i in dict.fromkeys(ids) if self._left.get(i) == 0 or self._gives_up(i)]
        for request_id in done:
            del self._left[request_id]
            self.scheduler.release(request_id)
        return seconds

    def _gives_up(self, request_id: int) -> bool:
        return (
            request_id in self._cancelled and request_id in self._left and self._rng.random() < 0.2
        )


def _params(max_tokens: int, room: int, is_open: bool) -> SamplingParams:
    """Parameters of a request, which may take all that fits if its end is not known."""
    return SamplingParams(max_tokens=room if is_open and room > 0 else max_tokens)


def _sweep(model: WorkModel) -> Iterator[StepWork]:
    for start in (0, 1000, 30_000):
        for tokens in (1, 32, 512):
            yield model.chunk(start, tokens, samples=tokens < 512, is_decode=tokens == 1)


def _seconds(work: StepWork) -> float:
    return float(np.dot(COSTS, work.features()))


def _pages(table: PageTable) -> list[list[int]]:
    """Of each extent of a table its group, then its pages."""
    return [[extent.group, *map(int, extent.pages)] for extent in table.extents]


def entry(plan: Plan) -> Entry:
    """Reduce a plan to what is compared."""
    return {
        "chunks": [list(chunk) for chunk in plan.chunks],
        "admitted": [[request_id, _pages(table)] for request_id, table in plan.tables],
        "released": list(plan.released),
        "set_back": list(plan.set_back),
        "hits": [list(hit[:3]) for hit in plan.hits],
        "predicted_s": plan.predicted_s,
    }


def are_equal(before: Entry | None, now: Entry | None) -> bool:
    if before is None or now is None:
        return False
    exact = all(before[name] == now[name] for name in EXACT)
    return exact and isclose(before["predicted_s"], now["predicted_s"], rel_tol=DIGITS)


def save(path: str, numbers: Iterable[int]) -> int:
    """Write the plans of the workloads of these numbers; how many plans that were."""
    num_plans = 0
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for number in numbers:
            entries = [entry(plan) for plan in Workload(number).plans()]
            file.write(json.dumps({"workload": number, "plans": entries}) + "\n")
            num_plans += len(entries)
    return num_plans


def check(path: str) -> tuple[int, list[str]]:
    """Plan the same workloads again.

    Returns:
        How many plans were equal, and of each workload that differs its first difference.
    """
    num_equal, differences = 0, []
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            number = line["workload"]
            plans = (entry(plan) for plan in Workload(number).plans())
            for index, (before, now) in enumerate(zip_longest(line["plans"], plans)):
                if not are_equal(before, now):
                    differences.append(
                        f"workload {number}, plan {index}:\n  before {before}\n  now    {now}"
                    )
                    break
                num_equal += 1
    return num_equal, differences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("save", "check"))
    parser.add_argument("file", help="of plans, gzipped JSON, a workload per line")
    parser.add_argument("--workloads", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.command == "save":
        num_plans = save(arguments.file, range(arguments.workloads))
        print(f"{num_plans:,} plans of {arguments.workloads} workloads saved")
        return 0
    num_equal, differences = check(arguments.file)
    for difference in differences:
        print(difference)
    print(f"{num_equal:,} plans are equal, {len(differences)} workloads differ")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
