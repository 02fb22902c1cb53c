"""The report of a simulated workload: times by kind of request, deadlines, throughput."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mnemosyne.metrics import percentiles
from mnemosyne.request import RequestOutput
from mnemosyne.simulate.workload import Arrival, as_row

Percentiles = dict[int, float]


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind together; times in seconds.

    Attributes:
        name: what the kind is called.
        count: requests that finished.
        ttft_s: time to the first token.
        tbt_s: gaps between consecutive tokens, of all requests together.
        tpot_s: mean gap of each request.
        on_time: share of requests whose first token met its deadline.
    """

    name: str
    count: int
    ttft_s: Percentiles
    tbt_s: Percentiles
    tpot_s: Percentiles
    on_time: float


@dataclass(frozen=True, slots=True)
class Report:
    """A workload that is over.

    Attributes:
        kinds: all requests, then short and long ones where there are both.
        num_refused: requests that no empty cache could hold.
        seconds: of simulated time, from the first arrival to the last token.
        tokens_per_s: prompt and output tokens.
        output_per_s: output tokens.
    """

    kinds: tuple[Kind, ...]
    num_refused: int
    seconds: float
    tokens_per_s: float
    output_per_s: float

    def as_json(self) -> dict[str, Any]:
        """Plain values; percentiles by name, such as ``p50``."""
        kinds = {
            kind.name: {
                "count": kind.count,
                "on_time": kind.on_time,
                **{
                    name: {f"p{p}": value for p, value in getattr(kind, name).items()}
                    for name in ("ttft_s", "tbt_s", "tpot_s")
                },
            }
            for kind in self.kinds
        }
        return {
            "requests": kinds,
            "refused": self.num_refused,
            "seconds": self.seconds,
            "tokens_per_s": self.tokens_per_s,
            "output_tokens_per_s": self.output_per_s,
        }


def make_report(
    arrivals: Sequence[Arrival],
    outputs: Sequence[RequestOutput],
    *,
    long_tokens: int,
) -> Report:
    """Sum up a workload.

    Args:
        arrivals: the requests.
        outputs: what each got, in the same order.
        long_tokens: prompts above it count as long.
    """
    pairs = list(zip(arrivals, outputs, strict=True))
    done = [(arrival, output) for arrival, output in pairs if output.error is None]
    is_long = [arrival.prompt_tokens > long_tokens for arrival, _ in done]
    kinds = [_kind("all", done)]
    if any(is_long) and not all(is_long):
        for name, wanted in (("short", False), ("long", True)):
            chosen = [pair for pair, long in zip(done, is_long, strict=True) if long == wanted]
            kinds.append(_kind(name, chosen))
    ends = [output.metrics.finished_s or 0.0 for _, output in done]
    seconds = max(ends, default=0.0) - min((a.arrival_s for a, _ in done), default=0.0)
    num_outputs = sum(len(output.token_ids) for _, output in done)
    num_tokens = num_outputs + sum(arrival.prompt_tokens for arrival, _ in done)
    per_s = 1 / seconds if seconds else 0.0
    return Report(
        tuple(kinds), len(pairs) - len(done), seconds, num_tokens * per_s, num_outputs * per_s
    )


def result_rows(
    arrivals: Sequence[Arrival], outputs: Sequence[RequestOutput]
) -> Iterable[dict[str, Any]]:
    """Each request and its outcome, as a line of JSONL."""
    for arrival, output in zip(arrivals, outputs, strict=True):
        yield as_row(arrival) | {
            "ttft_s": output.metrics.ttft_s,
            "tpot_s": tpot_s(output),
            "tbt_p99_s": percentiles(output.metrics.tbt_s)[99] if output.metrics.tbt_s else None,
            "finish_reason": output.finish_reason,
        }


def tpot_s(output: RequestOutput) -> float | None:
    """Mean gap between the tokens of a request; None if it has fewer than two."""
    gaps = output.metrics.tbt_s
    return sum(gaps) / len(gaps) if gaps else None


def _kind(name: str, done: Sequence[tuple[Arrival, RequestOutput]]) -> Kind:
    outputs = [output for _, output in done]
    ttfts = [(output.metrics.ttft_s or 0.0) for output in outputs]
    met = [not output.metrics.missed_deadline for output in outputs]
    return Kind(
        name=name,
        count=len(done),
        ttft_s=percentiles(ttfts),
        tbt_s=percentiles(list(chain.from_iterable(o.metrics.tbt_s for o in outputs))),
        tpot_s=percentiles([gap for gap in map(tpot_s, outputs) if gap is not None]),
        on_time=sum(met) / len(met) if met else float("nan"),
    )
