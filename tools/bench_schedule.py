"""Time of a scheduling decision with one 10M-token prompt and a thousand short requests.

No model and no rank runs: steps are planned, completed with made-up tokens and learned from, on a
clock that the predictor moves. Short requests that finish are replaced, so that their number stays.
Three states of the thousand: nearly all of them wait, all are admitted and prefill, all decode.

Three times of each step: the decision; what follows when the step is back (completing it, learning
from it, releasing who finished and queueing who comes instead), which delays the next step as much;
and both together. A machine shared with others makes some of any work slow: the last line tells by
how much, from a loop of plain arithmetic that took about as long as a decision.

With ``--cached`` prefixes are shared, and so many tokens of other prompts are known, whose pages
must go for new ones; a line in front tells how long hashing and looking up a prompt of 1M takes.

Usage: python tools/bench_schedule.py [--long 10M] [--short 1000] [--steps 2000] [--cached 10M]
       [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count

import numpy as np

from mnemosyne.cache.chain import Chain
from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place
from mnemosyne.config import ScheduleConfig, SloConfig, parse_size
from mnemosyne.metrics import percentiles
from mnemosyne.request import Request, SamplingParams
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.work import StepWork, WorkModel

PAGE_SIZE = 128
VOCAB_SIZE = 32_000
FILLER = -1  # the request that fills the cache
ENDLESS = 2**20  # output tokens of a request that never finishes here


@dataclass(frozen=True, slots=True)
class Case:
    """One state of the short requests."""

    name: str
    prompt_tokens: int  # of a short request, at most
    output_tokens: int
    max_sequences: int | None  # None: all of them


CASES = (
    Case("64 run, the others wait", prompt_tokens=512, output_tokens=32, max_sequences=64),
    Case("all prefill", prompt_tokens=8192, output_tokens=1, max_sequences=None),
    Case("all decode", prompt_tokens=32, output_tokens=ENDLESS, max_sequences=None),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Times of one state, in microseconds."""

    name: str
    num_decodes: float  # of a step, mean
    num_chunks: float
    decision_us: dict[int, float]
    after_us: dict[int, float]  # once the step is back
    step_us: dict[int, float]  # both


class Crowd:
    """One long prompt and short requests that are replaced as they finish."""

    def __init__(
        self, case: Case, long_tokens: int, num_short: int, policy: str, num_cached: int = 0
    ) -> None:
        room = case.prompt_tokens + case.output_tokens + PAGE_SIZE
        num_pages = (long_tokens + ENDLESS + num_short * room) // PAGE_SIZE + 1
        max_sequences = case.max_sequences or num_short + 1
        self.predictor = LinearPredictor()
        self.predictor.fit(list(gpu_like_steps()))
        self.scheduler = build_scheduler(
            ScheduleConfig(target_tbt=0.03, max_sequences=max_sequences, policy=policy),
            SloConfig(),
            num_groups=1,
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            max_tokens_per_group=num_pages * PAGE_SIZE,
            predictor=self.predictor,
            work_model=WorkModel((None,)),
            fingerprint=b"bench" if num_cached else None,
        )
        self.now_s = 0.0
        self._case = case
        self._rng = np.random.default_rng(0)
        self._is_shared = num_cached > 0
        if num_cached:
            fill(self.scheduler.ledger, min(num_cached, num_pages * PAGE_SIZE), self._rng)
        self._ids = count()
        self._left: dict[int, int] = {}  # output tokens to come
        self.scheduler.add(self._request(long_tokens, ENDLESS))
        for _ in range(num_short):
            self.scheduler.add(self._short())

    def _short(self) -> Request:
        prompt_tokens = int(self._rng.integers(16, self._case.prompt_tokens + 1))
        return self._request(prompt_tokens, self._case.output_tokens)

    def _request(self, prompt_tokens: int, output_tokens: int) -> Request:
        request_id = next(self._ids)
        self._left[request_id] = output_tokens
        return Request(
            request_id=request_id,
            prompt_ids=self._ids_of(prompt_tokens),
            params=SamplingParams(max_tokens=output_tokens),
            seed=0,
            end_token_ids=(),
            arrival_s=self.now_s,
        )

    def _ids_of(self, num_tokens: int) -> np.ndarray:
        """Tokens that nobody else has, where that matters."""
        if not self._is_shared:
            return np.zeros(num_tokens, dtype=np.int64)
        return self._rng.integers(0, VOCAB_SIZE, num_tokens)

    def step(self) -> tuple[float, float, int, int]:
        """Seconds of the decision, and of what follows; decodes and chunks of the step."""
        started_s = time.perf_counter()
        plan = self.scheduler.plan(self.now_s)
        planned_s = time.perf_counter()
        assert plan is not None
        self.now_s += plan.predicted_s
        tokens = {chunk.request_id: 7 for chunk in plan.chunks if chunk.samples}
        between_s = time.perf_counter()
        self.scheduler.complete(plan, tokens)
        self.scheduler.learn(plan, plan.predicted_s)
        after_s = time.perf_counter() - between_s
        for request_id in tokens:
            self._left[request_id] -= 1
            if self._left[request_id] == 0:
                after_s += self._replace(request_id)
        num_decodes = sum(chunk.is_decode for chunk in plan.chunks)
        return planned_s - started_s, after_s, num_decodes, len(plan.chunks) - num_decodes

    def _replace(self, request_id: int) -> float:
        """Another short request for one that finished; seconds in the scheduler."""
        started_s = time.perf_counter()
        self.scheduler.release(request_id)
        released_s = time.perf_counter()
        request = self._short()
        made_s = time.perf_counter()
        self.scheduler.add(request)
        return time.perf_counter() - made_s + released_s - started_s


def fill(ledger: Ledger, num_tokens: int, rng: np.random.Generator) -> None:
    """Have so many tokens cached, in prompts of a page to a few hundred of them."""
    while num_tokens >= PAGE_SIZE:
        length = min(num_tokens, int(rng.integers(1, 400)) * PAGE_SIZE) // PAGE_SIZE * PAGE_SIZE
        chain = Chain(b"bench", rng.integers(0, VOCAB_SIZE, length), PAGE_SIZE)
        ledger.reserve(FILLER, [Place(0)], length)
        ledger.release(FILLER, chain, length)
        num_tokens -= length


def lookup_us(num_steps: int) -> dict[int, float]:
    """Time hashing and looking up a prompt of 1M tokens that is cached, in microseconds."""
    ids, length = np.random.default_rng(1).integers(0, VOCAB_SIZE, 2**20), 2**20
    ledger = Ledger(
        [length // PAGE_SIZE], page_size=PAGE_SIZE, max_tokens_per_group=length, shares=True
    )
    ledger.reserve(FILLER, [Place(0)], length)
    ledger.release(FILLER, Chain(b"bench", ids, PAGE_SIZE), length)
    seconds = []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        found = ledger.match(0, Chain(b"bench", ids, PAGE_SIZE), 0, length // PAGE_SIZE)
        seconds.append(time.perf_counter() - started_s)
        assert len(found) == length // PAGE_SIZE
    return percentiles(1e6 * s for s in seconds)


def gpu_like_steps() -> Iterator[tuple[StepWork, float]]:
    """Steps of a machine on which 10M tokens take minutes: about an 8B model on eight H100."""
    model = WorkModel((None,))
    for start in (0, 10_000, 1_000_000, 10_000_000):
        for tokens in (1, 64, 1024):
            work = model.chunk(start, tokens, samples=True, is_decode=tokens == 1)
            seconds = 4e-3 + 5e-6 * tokens + 1e-10 * work.prefill_pairs + 5e-9 * work.decode_keys
            yield work, seconds


def measure(
    case: Case, long_tokens: int, num_short: int, num_steps: int, policy: str, num_cached: int
) -> Outcome:
    crowd = Crowd(case, long_tokens, num_short, policy, num_cached)
    is_steady = case.output_tokens < ENDLESS
    while crowd.step()[2] < num_short and not is_steady:
        pass  # until all of them decode
    gc.collect()
    steps = [crowd.step() for _ in range(num_steps)]
    decision_s, after_s, num_decodes, num_chunks = np.array(steps).T
    return Outcome(
        name=case.name,
        num_decodes=float(num_decodes.mean()),
        num_chunks=float(num_chunks.mean()),
        decision_us=percentiles(1e6 * decision_s),
        after_us=percentiles(1e6 * after_s),
        step_us=percentiles(1e6 * (decision_s + after_s)),
    )


def machine_us(num_steps: int) -> dict[int, float]:
    """Time the same piece of arithmetic on this machine, in microseconds."""
    seconds = []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        sum(number * number % 7 for number in range(2000))
        seconds.append(time.perf_counter() - started_s)
    return percentiles(1e6 * s for s in seconds)


def row(name: str, *times_us: dict[int, float]) -> str:
    cells = (f"{us[50]:11.0f}{us[99]:6.0f}" for us in times_us)
    return f"{name:<46}" + "".join(cells)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", default="10M", help="tokens of the long prompt")
    parser.add_argument("--short", type=int, default=1000, help="short requests")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--policy", default="lars")
    parser.add_argument("--cached", default="0", help="tokens of other prompts that are cached")
    parser.add_argument("--json", help="write the outcomes to this file")
    arguments = parser.parse_args()
    long_tokens = parse_size(arguments.long, "--long")
    outcomes = []
    print(f"{'microseconds, p50 and p99':<46}{'decision':>17}{'after it':>17}{'both':>17}")
    num_cached = parse_size(arguments.cached, "--cached")
    if num_cached:
        print(row("hashing and looking up 1M tokens", lookup_us(20)))
    for case in CASES:
        how_many = arguments.short, arguments.steps, arguments.policy, num_cached
        o = measure(case, long_tokens, *how_many)
        outcomes.append(o)
        name = f"{o.name}: {o.num_decodes:.0f} decodes, {o.num_chunks:.0f} chunks"
        print(row(name, o.decision_us, o.after_us, o.step_us))
    print(row("the same arithmetic each time", machine_us(arguments.steps)))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(outcome) for outcome in outcomes], file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
