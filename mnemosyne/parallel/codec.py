"""Plans, results and outputs as bytes: msgpack with small integers, token ids raw, pages as runs.

The bytes of a step do not depend on how long its contexts are: prompts travel once, with the plan
that admits their request, and page tables when they change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from msgspec import Struct

from mnemosyne.cache.table import Extent, PageTable
from mnemosyne.request import Logprobs, RequestMetrics, RequestOutput, Sampled, SamplingParams
from mnemosyne.schedule.plan import (
    Admission,
    Chunk,
    Fetch,
    PageCopy,
    Plan,
    Restore,
    Save,
    StepResult,
)

RUN_DTYPE = np.dtype("<i8")


@dataclass(frozen=True, slots=True)
class Stop:
    """No plan will follow."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The early end of a call on rank 0; the other ranks raise what it raises."""

    kind: str  # the name of the exception
    text: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Outputs:
    """The outputs of requests: the end of a call that every rank made."""

    outputs: list[RequestOutput]


Message = Plan | Stop | Interrupted | Outputs


class _Ids(Struct, array_like=True):
    """An array of token ids in the smallest integers that hold them, little-endian."""

    dtype: str
    data: bytes


class _Admission(Struct, array_like=True):
    request_id: int
    prompt: _Ids
    params: SamplingParams
    seed: int
    end_token_ids: tuple[int, ...]
    num_given: int


class _Table(Struct, array_like=True):
    request_id: int
    extents: list[tuple[int, int, bytes]]  # group, start, page runs
    lent: list[tuple[int, int, bytes]]
    rings: list[list[bytes]]  # page runs of each lane


class _Plan(Struct, array_like=True, tag="plan"):
    index: int
    predicted_s: float
    chunks: tuple[Chunk, ...]
    admitted: list[_Admission]
    released: tuple[int, ...]
    tables: list[_Table]
    copies: tuple[PageCopy, ...]
    saves: tuple[Save, ...]
    fetches: tuple[Fetch, ...]
    restores: tuple[Restore, ...]


class _Stop(Struct, array_like=True, tag="stop"):
    pass


class _Interrupted(Struct, array_like=True, tag="interrupted"):
    kind: str
    text: str


class _Output(Struct, array_like=True):
    request_id: int | None
    prompt: _Ids
    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    error: str | None
    logprobs: list[Logprobs] | None
    prompt_logprobs: list[Logprobs | None] | None
    metrics: RequestMetrics
    others: list[_Output] | None  # the samples after the first, which is the output itself


class _Outputs(Struct, array_like=True, tag="outputs"):
    outputs: list[_Output]


class _Result(Struct, array_like=True):
    index: int
    sampled: dict[int, Sampled]
    prompt_logprobs: dict[tuple[int, int], list[Logprobs]]
    broken: tuple[int, ...]
    restored: dict[int, int]


_ENCODER = msgspec.msgpack.Encoder()
_MESSAGES = msgspec.msgpack.Decoder(_Plan | _Stop | _Interrupted | _Outputs)
_RESULTS = msgspec.msgpack.Decoder(_Result)


def encode(message: Message) -> bytes:
    """A message of rank 0 to the other ranks."""
    match message:
        case Plan():
            wire: Struct = _plan_to_wire(message)
        case Stop():
            wire = _Stop()
        case Interrupted():
            wire = _Interrupted(message.kind, message.text)
        case Outputs():
            wire = _Outputs([_output_to_wire(output) for output in message.outputs])
    return _ENCODER.encode(wire)


def decode(data: bytes) -> Message:
    """The message that ``encode`` was given; arrays in it may be written to."""
    wire = _MESSAGES.decode(data)
    match wire:
        case _Plan():
            return _plan_from_wire(wire)
        case _Stop():
            return Stop()
        case _Interrupted():
            return Interrupted(wire.kind, wire.text)
    return Outputs([_output_from_wire(output) for output in wire.outputs])


def encode_result(result: StepResult) -> bytes:
    """The answer of a group to a step."""
    found = result.sampled, result.prompt_logprobs, result.broken, result.restored
    wire = _Result(result.index, *found)
    return _ENCODER.encode(wire)


def decode_result(data: bytes) -> StepResult:
    """The result that ``encode_result`` was given."""
    wire = _RESULTS.decode(data)
    return StepResult(
        wire.index,
        wire.sampled,
        wire.prompt_logprobs,
        broken=wire.broken,
        restored=wire.restored,
    )


def _plan_to_wire(plan: Plan) -> _Plan:
    admitted = [_admission_to_wire(admission) for admission in plan.admitted]
    tables = [_table_to_wire(*entry) for entry in plan.tables]
    changed = plan.released, tables, plan.copies, plan.saves, plan.fetches, plan.restores
    return _Plan(plan.index, plan.predicted_s, plan.chunks, admitted, *changed)


def _plan_from_wire(wire: _Plan) -> Plan:
    return Plan(
        index=wire.index,
        chunks=wire.chunks,
        admitted=tuple(_admission_from_wire(admission) for admission in wire.admitted),
        released=wire.released,
        tables=tuple((table.request_id, _table_from_wire(table)) for table in wire.tables),
        copies=wire.copies,
        saves=wire.saves,
        fetches=wire.fetches,
        restores=wire.restores,
        predicted_s=wire.predicted_s,
    )


def _admission_to_wire(admission: Admission) -> _Admission:
    return _Admission(
        request_id=admission.request_id,
        prompt=_ids_to_wire(admission.prompt_ids),
        params=admission.params,
        seed=admission.seed,
        end_token_ids=admission.end_token_ids,
        num_given=admission.num_given,
    )


def _admission_from_wire(wire: _Admission) -> Admission:
    return Admission(
        request_id=wire.request_id,
        prompt_ids=_ids_from_wire(wire.prompt),
        params=wire.params,
        seed=wire.seed,
        end_token_ids=wire.end_token_ids,
        num_given=wire.num_given,
    )


def _table_to_wire(request_id: int, table: PageTable) -> _Table:
    rings = [[pages_to_runs(track).tobytes() for track in ring] for ring in table.rings]
    return _Table(request_id, _extents_to_wire(table.extents), _extents_to_wire(table.lent), rings)


def _extents_to_wire(extents: Sequence[Extent]) -> list[tuple[int, int, bytes]]:
    return [(e.group, e.start, pages_to_runs(e.pages).tobytes()) for e in extents]


def _table_from_wire(table: _Table) -> PageTable:
    rings = (np.stack([_pages_of(runs) for runs in tracks]) for tracks in table.rings)
    lists = _extents_from_wire(table.extents), _extents_from_wire(table.lent)
    return PageTable(*lists, tuple(rings))


def _extents_from_wire(wire: Sequence[tuple[int, int, bytes]]) -> tuple[Extent, ...]:
    return tuple(Extent(group, start, _pages_of(runs)) for group, start, runs in wire)


def _pages_of(runs: bytes) -> np.ndarray:
    return runs_to_pages(np.frombuffer(runs, RUN_DTYPE).reshape(-1, 2))


def pages_to_runs(pages: np.ndarray) -> np.ndarray:
    """Page ids as runs of neighbours.

    Args:
        pages: int64 ``[P]``.

    Returns:
        int64, little-endian, ``[runs, 2]``: first page and number of pages.
    """
    first = np.flatnonzero(np.diff(pages, prepend=pages[:1] - 2) != 1)
    lengths = np.diff(first, append=len(pages))
    return np.stack([pages[first], lengths], axis=1).astype(RUN_DTYPE)


def runs_to_pages(runs: np.ndarray) -> np.ndarray:
    """The int64 page ids that ``pages_to_runs`` was given."""
    first, lengths = runs[:, 0], runs[:, 1]
    # A page is its index plus what its run is ahead of the indices.
    ahead = first - (np.cumsum(lengths) - lengths)
    return np.arange(lengths.sum(), dtype=np.int64) + np.repeat(ahead, lengths)


def _ids_to_wire(ids: np.ndarray) -> _Ids:
    fits = not ids.size or (ids.min() >= -(2**31) and ids.max() < 2**31)
    dtype = "<i4" if fits else "<i8"
    return _Ids(dtype, ids.astype(dtype).tobytes())


def _ids_from_wire(wire: _Ids) -> np.ndarray:
    return np.frombuffer(wire.data, wire.dtype).astype(np.int64)


def _output_to_wire(output: RequestOutput) -> _Output:
    others: Sequence[RequestOutput] | None = output.samples[1:] if output.samples else None
    return _Output(
        request_id=output.request_id,
        prompt=_ids_to_wire(output.prompt_token_ids),
        token_ids=output.token_ids,
        text=output.text,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        error=output.error,
        logprobs=output.logprobs,
        prompt_logprobs=output.prompt_logprobs,
        metrics=output.metrics,
        others=None if others is None else [_output_to_wire(other) for other in others],
    )


def _output_from_wire(wire: _Output) -> RequestOutput:
    output = RequestOutput(
        request_id=wire.request_id,
        prompt_token_ids=_ids_from_wire(wire.prompt),
        token_ids=wire.token_ids,
        text=wire.text,
        finish_reason=wire.finish_reason,
        stop_reason=wire.stop_reason,
        error=wire.error,
        logprobs=wire.logprobs,
        prompt_logprobs=wire.prompt_logprobs,
        metrics=wire.metrics,
    )
    if wire.others is not None:
        output.samples = [output, *(_output_from_wire(other) for other in wire.others)]
    return output
