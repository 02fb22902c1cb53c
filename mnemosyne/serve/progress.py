"""Signs of life on standard error: weights, compilation, prompt tokens computed, requests done."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mnemosyne.request import Piece, RequestOutput


class Bars:
    """Progress bars that leave nothing behind; silent where there is no terminal.

    Args:
        console: unset: standard error.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} {task.fields[unit]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (console.is_terminal or console.is_jupyter),
        )
        self._weights: TaskID | None = None
        self._compiled: TaskID | None = None
        self._prefilled: dict[int | None, int] = {}
        self._num_done = 0

    def read_weights(self, num_read: int, num_bytes: int) -> None:
        """Show how much of the weights is fetched, then read, in bytes."""
        total = num_bytes / 1e6
        if self._weights is None:
            self._weights = self._progress.add_task("weights", total=total, unit="MB")
        self._progress.update(self._weights, completed=num_read / 1e6, total=total)

    def compile(self, num_done: int, num_buckets: int) -> None:
        """Show how much of the model is compiled, in sizes of a step."""
        if self._compiled is None:
            self._compiled = self._progress.add_task("compile", total=num_buckets, unit="sizes")
        self._progress.update(self._compiled, completed=num_done)

    def expect(self, outputs: Sequence[RequestOutput]) -> None:
        """Show bars for requests that are about to run."""
        self._prefilled = {output.request_id: 0 for output in outputs}
        total = sum(len(output.prompt_token_ids) for output in outputs)
        self._prefill = self._progress.add_task("prefill", total=total, unit="tokens")
        self._requests = self._progress.add_task("done", total=len(outputs), unit="requests")

    def update(self, piece: Piece) -> None:
        """Enter the piece that a step brought for one request."""
        self._prefilled[piece.request_id] = piece.prefilled
        self._num_done += piece.finish_reason is not None
        self._progress.update(self._prefill, completed=sum(self._prefilled.values()))
        self._progress.update(self._requests, completed=self._num_done)

    def stop(self) -> None:
        """Take the bars away; the terminal belongs to the text now."""
        self._progress.stop()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
