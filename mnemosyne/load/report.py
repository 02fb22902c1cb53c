"""Report of a run: rates, percentiles, goodput; a line per request in a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mnemosyne.load.requests import Outcome
from mnemosyne.metrics import percentiles


def summary(outcomes: Sequence[Outcome], ttft_s: float, tbt_s: float) -> list[str]:
    """Lines for people.

    Args:
        outcomes: of all requests, refused and failed ones among them.
        ttft_s: to the first token that counts as good.
        tbt_s: between tokens, at the 99th percentile of a request.
    """
    ends = Counter(outcome.end for outcome in outcomes)
    seconds = max((o.start_s + o.seconds for o in outcomes), default=0.0) or 1e-9
    num_good = sum(outcome.is_good(ttft_s, tbt_s) for outcome in outcomes)
    num_tokens = sum(outcome.num_tokens for outcome in outcomes)
    shorts = [outcome for outcome in outcomes if not outcome.is_long]
    lines = [
        f"{len(outcomes)} requests in {seconds:.1f} s: {ends['served']} served, "
        f"{ends['refused']} refused, {ends['failed']} failed",
        f"goodput: {num_good / seconds:.2f} requests/s ({num_good} of {len(outcomes)} with a first "
        f"token within {ttft_s:g} s and p99 TBT within {1000 * tbt_s:g} ms)",
        f"output: {num_tokens / seconds:,.1f} tokens/s",
        _line("TTFT", [o.ttft_s for o in shorts if o.ttft_s is not None]),
        _line("TBT", [gap for o in shorts for gap in o.tbt_s]),
        *(f"the long one: TTFT {o.ttft_s:.2f} s" for o in outcomes if o.is_long and o.ttft_s),
    ]
    errors = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    return lines + [f"{count} times: {error}" for error, count in errors.most_common(5)]


def _line(name: str, seconds: list[float]) -> str:
    told = ", ".join(f"p{p} {1000 * s:,.1f}" for p, s in percentiles(seconds).items())
    return f"{name}: {told} ms"


def write(outcomes: Sequence[Outcome], path: str) -> None:
    """Write a line of JSON per request.

    Raises:
        OSError: if it cannot be written.
    """
    lines = (json.dumps({**asdict(outcome), "end": outcome.end}) + "\n" for outcome in outcomes)
    Path(path).write_text("".join(lines), encoding="utf-8")
