"""When each rank computed, received and sent, as a trace that Chrome and Perfetto draw."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

PIECE_BYTES = 2**22  # torch's TCPStore refuses a value of 8 MiB


class Store(Protocol):
    """The methods of a ``torch.distributed`` store that gathering needs."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Trace:
    """The spans of one rank, kept in memory until the end.

    Args:
        rank: global rank; rows are drawn in this order.
        label: how the rank is called, e.g. ``pp0/kvp1/tp0``.
        synchronize: waits for the device; called at both ends of a span, because a launch alone
            says nothing of when a GPU was busy. None where work is done when the call returns.
    """

    def __init__(
        self, rank: int, label: str, *, synchronize: Callable[[], None] | None = None
    ) -> None:
        self.rank = rank
        self.label = label
        self._synchronize = synchronize
        self._spans: list[dict[str, Any]] = []
        self._args: dict[str, Any] = {}
        # Ranks of several hosts share no monotonic clock; the wall clock may jump.
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()

    def begin(self, step: int, chunks: Iterable[tuple[int, int, int]]) -> None:
        """Say which step the spans that follow belong to.

        Args:
            step: index of the plan.
            chunks: request, first position and number of tokens of each chunk.
        """
        self._args = {"step": step, "chunks": [list(chunk) for chunk in chunks]}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record how long the body took; nothing if it raises."""
        start_ns = self._now_ns()
        yield
        stop_ns = self._now_ns()
        self._spans.append(
            {"name": name, "start_ns": start_ns, "stop_ns": stop_ns, "args": self._args}
        )

    def dump(self) -> str:
        """Everything recorded, as text for ``write_trace``."""
        return json.dumps({"rank": self.rank, "label": self.label, "spans": self._spans})

    def _now_ns(self) -> int:
        if self._synchronize is not None:
            self._synchronize()
        return self._epoch_ns + time.perf_counter_ns()


def gather_traces(trace: Trace, store: Store, world_size: int) -> list[str] | None:
    """Bring the traces of all ranks to rank 0; each rank calls it once.

    Args:
        trace: that of this rank.
        store: shared by all ranks.
        world_size: number of ranks.

    Returns:
        Dumps by rank on rank 0, None elsewhere.
    """
    dump = trace.dump()
    pieces = [dump[i : i + PIECE_BYTES] for i in range(0, len(dump), PIECE_BYTES)]
    for index, piece in enumerate(pieces):
        store.set(f"trace/{trace.rank}/{index}", piece)
    store.set(f"trace/{trace.rank}", str(len(pieces)))
    if trace.rank != 0:
        return None
    return [_read(store, rank) for rank in range(world_size)]


def _read(store: Store, rank: int) -> str:
    num_pieces = int(store.get(f"trace/{rank}"))
    return b"".join(store.get(f"trace/{rank}/{i}") for i in range(num_pieces)).decode()


def claim_trace(path: str | Path) -> None:
    """Make the file of a trace, empty, before the work whose trace it will hold.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        Path(path).write_text("", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"metrics.trace must be a file that can be written, got {str(path)!r} "
            f"({error.strerror}); name one in an existing directory"
        ) from error


def write_trace(path: str | Path, dumps: Iterable[str]) -> None:
    """Write a file for chrome://tracing or ui.perfetto.dev: a row per rank, times from 0.

    The work is done by then: a file that cannot be written is logged, and nothing else ends.

    Args:
        path: where to.
        dumps: ``Trace.dump`` of each rank.
    """
    ranks = [json.loads(dump) for dump in dumps]
    first_ns = min((span["start_ns"] for rank in ranks for span in rank["spans"]), default=0)
    events: list[dict[str, Any]] = []
    for rank in ranks:
        row = {"pid": 0, "tid": rank["rank"]}
        events.append({"ph": "M", "name": "thread_name", "args": {"name": rank["label"]}, **row})
        events += [
            {
                "ph": "X",
                "name": span["name"],
                "ts": (span["start_ns"] - first_ns) / 1e3,  # microseconds
                "dur": (span["stop_ns"] - span["start_ns"]) / 1e3,
                "args": span["args"],
                **row,
            }
            for span in rank["spans"]
        ]
    try:
        Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
    except OSError as error:
        log.warning("no trace: %s cannot be written (%s)", path, error.strerror)
