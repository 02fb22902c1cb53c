"""Six moments of a mesh at which a signal comes; ``tools/signals.py`` has many more."""

from __future__ import annotations

import platform
import signal
from pathlib import Path

import pytest

from tools.signals import Moment, run

pytestmark = [
    pytest.mark.skipif(platform.system() != "Linux", reason="looks round in /proc"),
    pytest.mark.timeout(600),
]


@pytest.mark.parametrize(
    "moment",
    [
        Moment("tp", "own", "KILL", "launcher", "start", 1.0),
        Moment("tp", "own", "INT", "launcher", "start", 2.5),
        Moment("kvp", "own", "KILL", "rank 1", "prefill", 5),
        Moment("pp", "own", "TERM", "rank 1", "prefill", 12),
        Moment("tp", "own", "SHORT", "rank 0", "decode", 30),
        Moment("kvp", "own", "TERM", "all", "decode", 32),
    ],
    ids=lambda moment: f"{moment.signal}-{moment.target}-{moment.phase}-{moment.mesh}",
)
def test_a_signal_leaves_nothing_behind_and_the_right_rank_is_named(
    moment: Moment, tmp_path: Path
) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # children inherit SIG_IGN
    try:
        outcome = run(moment, tmp_path)
    finally:
        signal.signal(signal.SIGINT, handler)

    assert outcome.faults == [], outcome.said
