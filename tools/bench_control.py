"""Time the control plane of a step: plans to all ranks, page tables kept, results back.

One request of 10M tokens and 256 short ones on a mesh of pp=2, kvp=2, tp=2. Scheduler, plans, page
tables, codec, channel and the packing of tensors are the real ones; there is no model, and sampled
tokens are made up. First each part alone, in the driver and in one other rank; then one hop between
two processes; then whole steps with all ranks at work, which on few cores wait for each other as
ranks of a real mesh do not.

Usage: python tools/bench_control.py [--ranks 8] [--length 10M] [--short 256] [--steps 200]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from torch.distributed import TCPStore

from mnemosyne.config import ScheduleConfig, SloConfig, parse_size
from mnemosyne.parallel import codec
from mnemosyne.parallel.control import DriverChannel, FollowerChannel
from mnemosyne.request import Request, Sampled, SamplingParams
from mnemosyne.runtime.inputs import build_inputs
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.schedule.build_scheduler import build_scheduler
from mnemosyne.schedule.plan import Plan, StepResult
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import WorkModel

HOST = "127.0.0.1"
PAGE_SIZE = 128
NUM_GROUPS = 2
VOCAB_SIZE = 128_000
SHORT_TOKENS = 500  # of each short prompt
OUTPUT_TOKENS = 2000
CHUNK = 512
STEP_S = 0.03  # what the predictor is told
SKIP_CHUNK = 1 << 20  # to have the long prompt prefilled soon

Value = TypeVar("Value")
Times = dict[str, list[float]]  # microseconds by part


class Replica:
    """Work of a rank with a plan besides computing it.

    Args:
        group: index on the kvp axis.
        times: where its parts are noted.
    """

    def __init__(self, group: int, times: Times) -> None:
        self._group = group
        self._times = times
        self._sequences: dict[int, SequenceState] = {}

    def take(self, plan: Plan) -> StepResult:
        """Follow the changes of a plan and pack its rows; the result is made up."""
        timed(self._times, "apply", lambda: self._apply(plan))
        timed(self._times, "pack", lambda: self._pack(plan))
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        return StepResult(plan.index, {c.request_id: Sampled(c.stop % 1000) for c in sampling})

    def _apply(self, plan: Plan) -> None:
        for admission in plan.admitted:
            self._sequences[admission.request_id] = SequenceState.start(admission)
        for chunk in plan.chunks:
            if chunk.token_id is not None:
                self._sequences[chunk.request_id].append(chunk.token_id, chunk.start)

    def _pack(self, plan: Plan) -> None:
        build_inputs(
            plan,
            self._sequences,
            group=self._group,
            num_groups=NUM_GROUPS,
            page_size=PAGE_SIZE,
            padding_slot=0,
            device=torch.device("cpu"),
        )


def timed(times: Times, part: str, function: Callable[[], Value]) -> Value:
    """Call a function and note how long it took."""
    started_s = time.perf_counter()
    value = function()
    times[part].append(1e6 * (time.perf_counter() - started_s))
    return value


def make_scheduler(length: int, num_short: int, chunk: int) -> Scheduler:
    """A scheduler with the short requests waiting, and the long one behind them."""
    pages_per_group = (length + OUTPUT_TOKENS) // NUM_GROUPS // PAGE_SIZE + 1
    short_pages = num_short * ((SHORT_TOKENS + OUTPUT_TOKENS) // PAGE_SIZE + 1)
    scheduler = build_scheduler(
        ScheduleConfig(chunk=chunk, max_chunk=chunk, max_sequences=num_short + 1, policy="fcfs"),
        SloConfig(),
        num_groups=NUM_GROUPS,
        num_pages=pages_per_group + short_pages,
        page_size=PAGE_SIZE,
        max_tokens_per_group=pages_per_group * PAGE_SIZE,
        predictor=LinearPredictor(),
        work_model=WorkModel((None,), NUM_GROUPS),
    )
    rng = np.random.default_rng(0)
    lengths = [SHORT_TOKENS] * num_short + [length]
    for request_id, num_tokens in enumerate(lengths):
        scheduler.add(
            Request(
                request_id=request_id,
                prompt_ids=rng.integers(0, VOCAB_SIZE, num_tokens),
                params=SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0.0),
                seed=0,
                end_token_ids=(2,),
                arrival_s=float(request_id),
            )
        )
    return scheduler


def plans(scheduler: Scheduler, times: Times) -> Iterator[Plan]:
    """Plans, each completed before the next: send back the result of one to get another."""
    while True:
        plan = timed(times, "plan", lambda: scheduler.plan(0.0))
        assert plan is not None
        result: StepResult = yield plan
        tokens = {request: sampled.token_id for request, sampled in result.sampled.items()}
        scheduler.complete(plan, tokens)
        scheduler.learn(plan, STEP_S)


def run(
    arguments: argparse.Namespace, chunk: int, num_decodes: int, step: Callable[[Plan], StepResult]
) -> Times:
    """Step until ``--steps`` steps had the given number of decodes; the times of planning."""
    times: Times = defaultdict(list)
    source = plans(make_scheduler(arguments.length, arguments.short, chunk), times)
    plan, num_steady = next(source), 0
    while num_steady < arguments.steps:
        result = step(plan)
        num_steady += sum(chunk.is_decode for chunk in plan.chunks) == num_decodes
        plan = source.send(result)
    return times


def bench_parts(arguments: argparse.Namespace, chunk: int, num_decodes: int) -> None:
    """Each part of a step, alone on the machine."""
    times: Times = defaultdict(list)
    replica = Replica(0, times)
    sizes = []

    def step(plan: Plan) -> StepResult:
        data = timed(times, "encode", lambda: codec.encode(plan))
        sizes.append(len(data))
        arrived = timed(times, "decode", lambda: codec.decode(data))
        assert isinstance(arrived, Plan)
        result = replica.take(arrived)
        back = timed(times, "encode result", lambda: codec.encode_result(result))
        return timed(times, "decode result", lambda: codec.decode_result(back))

    times |= run(arguments, chunk, num_decodes, step)
    print(f"  largest plan (it admits the long request): {max(sizes):,} bytes, once")
    print(f"  plan of a steady step: {median(sizes[-arguments.steps :]):,.0f} bytes")
    for part in ("plan", "encode", "decode", "apply", "pack", "encode result", "decode result"):
        print(f"  {part:<14}{median(times[part][-arguments.steps :]):8.0f} us")


def bench_hop() -> None:
    """An empty plan to one other process and an empty result back, halved."""
    with followers(2) as channel:
        seconds = []
        for index in range(1000):
            started_s = time.perf_counter()
            channel.send_plan(Plan(index, ()))
            channel.recv_result()
            seconds.append((time.perf_counter() - started_s) / 2)
    print(f"one hop between two processes: {1e6 * median(seconds):.0f} us")


def bench_steps(arguments: argparse.Namespace, chunk: int, num_decodes: int) -> None:
    """Whole steps: planned, sent to all ranks, packed by all, one result per group back."""
    seconds = []
    with followers(arguments.ranks) as channel:

        def step(plan: Plan) -> StepResult:
            started_s = time.perf_counter()
            channel.send_plan(plan)
            results = [channel.recv_result() for _ in range(min(NUM_GROUPS, arguments.ranks - 1))]
            seconds.append(time.perf_counter() - started_s)
            return results[0]

        run(arguments, chunk, num_decodes, step)
    print(f"  from a plan sent to its results: {1e6 * median(seconds[-arguments.steps :]):.0f} us")


@contextmanager
def followers(num_ranks: int) -> Iterator[DriverChannel]:
    """Rank 0's end of a channel to processes that do all but compute."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [
        context.Process(target=follow, args=(store.port, rank, num_ranks))
        for rank in range(1, num_ranks)
    ]
    for process in processes:
        process.start()
    channel = DriverChannel(store, num_ranks)
    yield channel
    channel.send_stop()
    channel.close()
    for process in processes:
        process.join()


def follow(port: int, rank: int, num_ranks: int) -> None:
    """One rank; the last ones report for their groups."""
    torch.set_num_threads(1)
    channel = FollowerChannel(TCPStore(HOST, port, is_master=False), rank)
    replica = Replica(rank % NUM_GROUPS, defaultdict(list))
    while isinstance(message := channel.recv(), Plan):
        result = replica.take(message)
        if rank >= num_ranks - NUM_GROUPS:
            channel.send_result(result)
    channel.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--length", type=lambda text: parse_size(text, "--length"), default="10M")
    parser.add_argument("--short", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        f"{arguments.short} decodes and a chunk of {CHUNK} of the long prompt": (
            CHUNK,
            arguments.short,
        ),
        f"{arguments.short} decodes and one of the long request": (SKIP_CHUNK, arguments.short + 1),
    }
    bench_hop()
    for name, (chunk, num_decodes) in cases.items():
        print(f"{name}:")
        bench_parts(arguments, chunk, num_decodes)
        bench_steps(arguments, chunk, num_decodes)


if __name__ == "__main__":
    main()
