"""The profile of a step: each part once, and all of them together the step."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.profile_step import Clock

ROOT = Path(__file__).resolve().parent.parent.parent


class Layer:
    """Takes 5 seconds of a made-up clock, 3 of them in a product."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def forward(self) -> None:
        self.now_s += 1.0
        self.product()
        self.now_s += 1.0

    def product(self) -> None:
        self.now_s += 3.0

    def step(self) -> None:
        self.forward()
        self.forward()
        self.now_s += 0.5


def test_a_part_does_not_count_the_part_within_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, clock = Layer(), Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: layer.now_s)
    layer.forward = clock.watched("layer", layer.forward)  # type: ignore[method-assign]
    layer.product = clock.watched("product", layer.product)  # type: ignore[method-assign]

    read = [clock.read(layer.step) for _ in range(2)]

    assert read == [{"step": 10.5, "layer": 4.0, "product": 6.0, "the rest": 0.5}] * 2


def test_it_tells_the_parts_of_a_decode_and_of_every_chunk_of_a_prefill() -> None:
    words = "--length 256 --chunk 128 --whole --steps 2 --rows 1 --threads 1 --attention cpu"

    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "profile_step.py"), *words.split()],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )

    decode, prefill = done.stdout.split("prefill of ")
    prefill, operators = prefill.split("  operators, with the profiler")
    assert decode.startswith("decode of 1 at 256 tokens")
    assert prefill.startswith("2 chunks of 128 tokens after 0")
    assert "aten::" in operators
    for text, absent in ((decode, set()), (prefill, {"logits"})):
        found = {
            name: float(ms) for name, ms in re.findall(r"^  (\S.*?) +([\d.]+) ms ", text, re.M)
        }
        step_ms = found.pop("step")
        assert min(ms for name, ms in found.items() if name not in absent) > 0
        if text is prefill:  # of a decode each number is a median of its own
            assert sum(found.values()) == pytest.approx(step_ms, abs=0.1)
