"""The short sweep at start-up that a step-time predictor is fitted from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.table import PageTable
from mnemosyne.request import SamplingParams
from mnemosyne.schedule.plan import Admission, Chunk, Executor, Plan
from mnemosyne.schedule.work import StepWork, WorkModel

Shape = tuple[tuple[int, int, bool], ...]  # (context, tokens, is_decode) of each chunk
Sample = tuple[StepWork, float]  # the work of a step, and the seconds that it took

CHUNK_SWEEP = ((0, 32), (0, 128), (0, 512), (0, 2048), (0, 8192))  # (context, tokens)
CONTEXT_SWEEP = ((4096, 32), (4096, 256), (32768, 32), (32768, 128), (32768, 512))
DECODE_SWEEP = ((512, 1), (512, 4), (512, 16), (32768, 1))  # (context, sequences)
MIXED_SWEEP = ((512, 8, 64), (512, 8, 256))  # (context, sequences, chunk beside them)
REPEATS = 3  # timed runs of a step, the fastest of which counts
ENOUGH_S = 0.3  # runs that took this long together are not repeated
PROBE = (((0, 128, False),), ((512, 1, True),) * 4)  # steps that show whether a fit still holds


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a synthetic step."""

    num_pages: int
    kinds: PageKinds
    max_positions: int
    vocab_size: int
    step_s: float  # a sweep stops growing where one step takes this long
    max_rows: int = 8192  # of a step in chunks, where layers forget what they pass by


def calibrate(
    executor: Executor,
    work_model: WorkModel,
    limits: Limits,
    *,
    clock: Callable[[], float],
    is_probe: bool = False,
) -> list[Sample]:
    """Time synthetic steps on an idle executor.

    Args:
        executor: as for ``sweep``, and so are the others.
        work_model: counts the work of each step.
        limits: the size of cache, model and step.
        clock: seconds.
        is_probe: a few small steps only, to check what an earlier sweep found.

    Returns:
        ``(work, seconds)`` of each step that fits; none if the cache is tiny.
    """
    families = [[shape] for shape in PROBE] if is_probe else list(_families())
    return list(_sweep(executor, work_model, limits, clock, families, {}).values())


def sweep(
    executor: Executor,
    work_model: WorkModel,
    limits: Limits,
    *,
    clock: Callable[[], float],
    known: Mapping[Shape, float],
) -> dict[Shape, Sample]:
    """Time those synthetic steps that an earlier sweep did not reach, on an idle executor.

    The first run of each step does not count. Of those that follow the fastest does: whatever else
    the machine was busy with can only have made the others slower. A step that takes long runs
    once more only. The contexts are pages nobody wrote, so they hold zeros: times of linear layers
    and of prefill attention are real, reads of a long cache come out of the processor's own caches
    and are corrected by the steps that follow.

    Args:
        executor: idle, with an empty cache.
        work_model: counts the work of each step.
        limits: the size of cache, model and step; they bound the range of the sweep.
        clock: seconds.
        known: seconds of steps that were timed before, within whatever limits.

    Returns:
        Work and seconds of each new step that fits; none if the cache is tiny.
    """
    return _sweep(executor, work_model, limits, clock, list(_families()), known)


def _sweep(
    executor: Executor,
    work_model: WorkModel,
    limits: Limits,
    clock: Callable[[], float],
    families: Sequence[Sequence[Shape]],
    known: Mapping[Shape, float],
) -> dict[Shape, Sample]:
    samples: dict[Shape, Sample] = {}
    for family in families:
        for shape in family:
            plans = _plans(shape, limits)
            if plans is None:
                continue
            seconds = known.get(shape)
            if seconds is None:
                seconds = _fastest(executor, plans, clock)
                samples[shape] = _work(work_model, plans), seconds
            if seconds > limits.step_s:
                break
    return samples


def _families() -> Iterator[list[Shape]]:
    """Sweeps in which each step is larger than the one before."""
    yield [((context, tokens, False),) for context, tokens in CHUNK_SWEEP]
    for context in sorted({context for context, _ in CONTEXT_SWEEP}):
        yield [((c, tokens, False),) for c, tokens in CONTEXT_SWEEP if c == context]
    yield [((context, 1, True),) * count for context, count in DECODE_SWEEP]
    yield [
        (*(((context, 1, True),) * count), (context, chunk, False))
        for context, count, chunk in MIXED_SWEEP
    ]


def _plans(shape: Shape, limits: Limits) -> list[Plan] | None:
    """The step, its repeats, then a plan that takes its requests away; None if it is too large."""
    room = max(context + tokens for context, tokens, _ in shape) + 1 + REPEATS
    pages_each = limits.kinds.pages(room)
    if pages_each * len(shape) > limits.num_pages or room > limits.max_positions:
        return None
    if limits.kinds.windows and sum(tokens for _, tokens, _ in shape) > limits.max_rows:
        return None
    admitted, tables = [], []
    for index, (context, tokens, is_decode) in enumerate(shape):
        table = _table(limits.kinds, room, first=index * pages_each)
        tables.append((_request_id(index), table))
        num_prompt_tokens = context if is_decode else context + tokens
        admitted.append(
            Admission(
                request_id=_request_id(index),
                prompt_ids=np.arange(num_prompt_tokens, dtype=np.int64) % limits.vocab_size,
                params=SamplingParams(max_tokens=1 + REPEATS, temperature=0.0),
                seed=0,
                end_token_ids=(),
            )
        )
    ids = tuple(admission.request_id for admission in admitted)
    return [
        Plan(0, _chunks(shape, 0), tuple(admitted), tables=tuple(tables)),
        *(Plan(index=n, chunks=_chunks(shape, n)) for n in range(1, 1 + REPEATS)),
        Plan(index=1 + REPEATS, chunks=(), released=ids),
    ]


def _table(kinds: PageKinds, room: int, *, first: int) -> PageTable:
    """A table for this many tokens, of the pages from ``first`` on."""
    num_rings = kinds.ring_pages(room)
    kept = np.arange(first + num_rings, first + kinds.pages(room), dtype=np.int64)
    rings = []
    for window, count in zip(kinds.windows, kinds.rings(room), strict=True):
        stop = first + window.tracks * count
        rings.append(np.arange(first, stop, dtype=np.int64).reshape(window.tracks, count))
        first = stop
    return replace(PageTable.on(0, kept), rings=tuple(rings))


def _chunks(shape: Shape, repeat: int) -> tuple[Chunk, ...]:
    """The chunks of a shape; a decode moves on by a token each time, a prefill runs again."""
    return tuple(
        Chunk(_request_id(index), context + repeat, 1, samples=True, token_id=0)
        if is_decode
        else Chunk(_request_id(index), context, tokens, samples=False)
        for index, (context, tokens, is_decode) in enumerate(shape)
    )


def _work(work_model: WorkModel, plans: list[Plan]) -> StepWork:
    """The work of the repeated step; all of it is on the first group."""
    work = work_model.nothing
    for chunk, (_, table) in zip(plans[1].chunks, plans[0].tables, strict=True):
        work = work_model.add(work, chunk, table)
    return work[0]


def _request_id(index: int) -> int:
    return -1 - index  # apart from the ids of real requests, which count up from 0


def _fastest(executor: Executor, plans: list[Plan], clock: Callable[[], float]) -> float:
    """Run a step and its repeats; the seconds of the fastest."""
    first, *repeats, release = plans
    _time(executor, first, clock)
    seconds: list[float] = []
    for plan in repeats:
        if sum(seconds) < ENOUGH_S:
            seconds.append(_time(executor, plan, clock))
    _time(executor, release, clock)
    return min(seconds)


def _time(executor: Executor, plan: Plan, clock: Callable[[], float]) -> float:
    started_s = clock()
    executor.submit(plan)
    executor.collect()
    return clock() - started_s
