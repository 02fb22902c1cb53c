"""Progress bars of the offline API: how far prompts are computed, how many are done."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mnemosyne.request import Piece, RequestOutput


class ProgressBars:
    """Two bars over a list of requests: prompt tokens computed, and requests done.

    Args:
        outputs: of all requests that will run; refused ones are left out.
    """

    def __init__(self, outputs: Sequence[RequestOutput]) -> None:
        samples = [s for o in outputs for s in (o.samples or [o]) if s.finish_reason is None]
        self._prefilled = {sample.request_id: 0 for sample in samples}
        self._num_done = 0
        self._progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        total = sum(len(sample.prompt_token_ids) for sample in samples)
        self._prefill = self._progress.add_task("prefill", total=total)
        self._requests = self._progress.add_task("done", total=len(samples))

    def update(self, piece: Piece) -> None:
        """Enter what a step brought for one request."""
        if piece.request_id in self._prefilled:
            self._prefilled[piece.request_id] = piece.prefilled
        self._num_done += piece.finish_reason is not None
        self._progress.update(self._prefill, completed=sum(self._prefilled.values()))
        self._progress.update(self._requests, completed=self._num_done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()
