"""A trace is a file that Chrome and Perfetto read: a row per rank, spans with their chunks."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from torch.distributed import HashStore

from mnemosyne.parallel import trace as module
from mnemosyne.parallel.trace import Trace, gather_traces, write_trace


def recorded(rank: int, label: str) -> Trace:
    trace = Trace(rank, label)
    for step, name in enumerate(("recv", "compute", "send")):
        trace.begin(step, [(7, 128 * step, 128)])
        with trace.span(name):
            pass
    return trace


def test_a_trace_has_a_row_per_rank_and_spans_in_microseconds(tmp_path: Path) -> None:
    traces = [recorded(0, "pp0/kvp0/tp0"), recorded(1, "pp1/kvp0/tp0")]

    write_trace(tmp_path / "trace.json", [trace.dump() for trace in traces])

    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    spans = [event for event in events if event["ph"] == "X"]
    assert names == {0: "pp0/kvp0/tp0", 1: "pp1/kvp0/tp0"}
    assert [(span["tid"], span["name"]) for span in spans] == [
        (rank, name) for rank in (0, 1) for name in ("recv", "compute", "send")
    ]
    assert spans[1]["args"] == {"step": 1, "chunks": [[7, 128, 128]]}
    assert spans[0]["ts"] == 0
    assert all(0 <= span["dur"] < 1e6 for span in spans)
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in pairwise(spans[:3]))


def test_a_trace_without_spans_is_a_file_too(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", [Trace(0, "pp0/kvp0/tp0").dump()])

    (event,) = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert event["args"]["name"] == "pp0/kvp0/tp0"


def test_a_device_is_waited_for_at_both_ends_of_a_span() -> None:
    calls: list[str] = []
    trace = Trace(0, "pp0/kvp0/tp0", synchronize=lambda: calls.append("synchronize"))

    with trace.span("compute"):
        calls.append("body")

    assert calls == ["synchronize", "body", "synchronize"]


def test_rank_0_gathers_what_all_ranks_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 100)  # several pieces each
    store, traces = HashStore(), [recorded(rank, f"pp{rank}/kvp0/tp0") for rank in range(3)]
    others = [threading.Thread(target=gather_traces, args=(t, store, 3)) for t in traces[1:]]

    for thread in others:
        thread.start()
    dumps = gather_traces(traces[0], store, 3)
    for thread in others:
        thread.join()

    assert dumps == [trace.dump() for trace in traces]
