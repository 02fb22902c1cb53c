"""The view of a running demo, and the table it ends with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mnemosyne.llm import LLM
from mnemosyne.metrics import StepRecord, percentiles
from mnemosyne.request import Piece, RequestOutput

if TYPE_CHECKING:
    from mnemosyne.cli.demo import Asked

PLAIN_EVERY_S = 5.0  # between lines where there is no terminal
SHOWN_WORDS = 9  # of each short answer


class DemoView:
    """A live picture on a terminal, a line now and then elsewhere.

    Args:
        llm: what serves.
        records: the steps so far; the caller appends.
        target_tbt_s: what a step with decodes is cut to, seconds.
    """

    def __init__(self, llm: LLM, records: Sequence[StepRecord], *, target_tbt_s: float) -> None:
        self._llm = llm
        self._records = records
        self._target_tbt_s = target_tbt_s
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=8, transient=True)
        self._prefilled = 0
        self._last_line_s = time.perf_counter()

    def update(
        self, long: RequestOutput | None, shorts: Sequence[Asked], pieces: Sequence[Piece]
    ) -> None:
        """Show the state after a step."""
        for piece in pieces:
            if long is not None and piece.request_id == long.request_id:
                self._prefilled = piece.prefilled
        if long is None or not self._records:
            return
        if self._console.is_terminal:
            self._live.update(self._picture(long, shorts))
        elif time.perf_counter() - self._last_line_s > PLAIN_EVERY_S:
            self._last_line_s = time.perf_counter()
            self._console.print(self._prefill_line(long), self._step_line(), sep="; ")

    def stop(self) -> None:
        self._live.stop()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _picture(self, long: RequestOutput, shorts: Sequence[Asked]) -> Group:
        total = len(long.prompt_token_ids)
        bar = ProgressBar(total=total, completed=self._prefilled, width=60)
        table = Table(box=None, show_header=False, padding=(0, 1))
        for short in shorts:
            output = short.output
            mark = "done" if output.finish_reason else "…"
            words = output.text.split()
            table.add_row(short.name, " ".join(words[-SHOWN_WORDS:]), Text(mark, style="dim"))
        return Group(Text(self._prefill_line(long)), bar, Text(self._step_line()), table)

    def _prefill_line(self, long: RequestOutput) -> str:
        return f"long prompt: {self._prefilled:,} of {len(long.prompt_token_ids):,} tokens"

    def _step_line(self) -> str:
        record = self._records[-1]
        return (
            f"step {record.index}: {record.num_decodes} decodes + {record.chunk_tokens} prefill "
            f"tokens, {1e3 * record.predicted_s:.0f} ms predicted, "
            f"{1e3 * record.actual_s:.0f} ms taken, target {1e3 * self._target_tbt_s:.0f} ms"
        )


def times_table(alone: Sequence[RequestOutput], together: Sequence[RequestOutput]) -> str:
    """TTFT and TBT of the short requests in milliseconds, without and with the long prompt."""
    table = Table(title="short requests, milliseconds", title_justify="left")
    for name in ("", "", "p50", "p95", "p99"):
        table.add_column(name, justify="left" if not name else "right")
    for label, outputs in (("without the long prompt", alone), ("with it", together)):
        ttft_s = [o.metrics.ttft_s for o in outputs if o.metrics.ttft_s is not None]
        tbt_s = [gap for o in outputs for gap in o.metrics.tbt_s]
        for name, values in (("TTFT", ttft_s), ("TBT", tbt_s)):
            found = percentiles(values).values()
            table.add_row(name, label, *(f"{1e3 * s:.1f}" if values else "-" for s in found))
    console = Console(width=76)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()
