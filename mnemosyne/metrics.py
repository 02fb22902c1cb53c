"""Step records, and percentiles of the times that requests see."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TextIO

import numpy as np

log = logging.getLogger(__name__)

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine. Times are in seconds."""

    index: int
    time_s: float  # when the step was planned, from the engine's start
    num_decodes: int
    chunks: tuple[tuple[int, int, int], ...]  # prefill: (request, first position, tokens)
    predicted_s: float
    actual_s: float  # from planned to its tokens streamed
    pages_used: int
    num_pages: int
    num_running: int
    num_waiting: int
    num_sampled: int = 0  # rows that got logits
    decode_keys: int = 0  # tokens of context, summed over the decodes
    slack_s: tuple[float, ...] = ()  # of each prefill's request as planned, before its deadline
    num_missed: int = 0  # first tokens of this step that came after their deadlines
    # of requests that started: (request, prompt tokens cached, first position that differs)
    hits: tuple[tuple[int, int, int | None], ...] = ()
    # of each of ``chunks``: the group that computed a slice, None where all that hold its keys did
    groups: tuple[int | None, ...] = ()
    num_handed: int = 0  # rows of slices, by group that their keys and values went to
    pages_lent: int = 0  # of those that are used, pages of copies for prompts of other groups
    num_set_back: int = 0  # requests that gave their pages up, to compute all of them again
    leaves_saved: int = 0  # copied out of pages, for cache.dir
    leaves_restored: int = 0  # of cache.dir, asked for in this step

    @property
    def chunk_tokens(self) -> int:
        return sum(num_tokens for _, _, num_tokens in self.chunks)


class StepLog:
    """Appends step records to a JSONL file, one line per step, flushed as it goes.

    A record is not worth a request: where the file cannot be written any more, as on a full disk,
    that is logged once and the records that follow are lost.

    Raises:
        ValueError: if the file cannot be opened for writing.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self._file: TextIO = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(
                f"metrics.path must be a file that can be written, got {str(path)!r} "
                f"({error.strerror}); name one in an existing directory"
            ) from error

        self._is_lost = False

    def write(self, record: StepRecord) -> None:
        if self._is_lost:
            return
        try:
            self._file.write(json.dumps(asdict(record)) + "\n")
            self._file.flush()
        except OSError as error:
            self._lose(error)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:  # it tries once more to write what it holds
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self._is_lost:
            log.warning("no step records from here on: %s: %s", self._file.name, error.strerror)
        self._is_lost = True

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class StepListener:
    """A callback for step records that never ends a request.

    Its first exception is logged, and it is not called again.

    Args:
        callback: of the user.
    """

    def __init__(self, callback: Callable[[StepRecord], None]) -> None:
        self._callback: Callable[[StepRecord], None] | None = callback

    def __call__(self, record: StepRecord) -> None:
        if self._callback is None:
            return
        try:
            self._callback(record)
        except Exception:  # code of the user
            self._callback = None
            log.exception("on_step failed and is not called any more; requests go on")


def read_steps(path: str | Path) -> list[StepRecord]:
    """The records of a file that ``StepLog`` wrote.

    Raises:
        ValueError: naming file and line, where a line is not a step record.
    """
    records = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                fields = json.loads(line)
                fields["chunks"] = tuple(tuple(chunk) for chunk in fields["chunks"])
                fields["slack_s"] = tuple(fields.get("slack_s", ()))
                fields["groups"] = tuple(fields.get("groups", ()))
                fields["hits"] = tuple(tuple(hit) for hit in fields.get("hits", ()))
                records.append(StepRecord(**fields))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} must be a step record, got {line[:80]!r}; "
                    "give a file written by metrics.path"
                ) from error
    return records


def percentiles(values: Iterable[float] | Sequence[float]) -> dict[int, float]:
    """p50, p95 and p99 by the percentile as key; nan where there are no values."""
    array = np.asarray(list(values), dtype=np.float64)
    if array.size == 0:
        return {p: float("nan") for p in PERCENTILES}
    return {p: float(np.percentile(array, p)) for p in PERCENTILES}
