"""How long work takes, and the peaks of the device that speeds are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Entry = tuple[str, dict[str, Any]]  # what was looked at, and what came out


def device_of(smoke: bool) -> torch.device:
    """The GPU; the CPU for a smoke run."""
    return torch.device("cpu" if smoke else "cuda")


def seconds_of(work: Callable[[], object], smoke: bool) -> float:
    """Median of seven runs by CUDA events; one run by the clock in a smoke run."""
    work()
    if smoke:
        started_s = time.perf_counter()
        work()
        return time.perf_counter() - started_s
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return sorted(times)[len(times) // 2]


def timed(work: Callable[[], object], smoke: bool, unit: str, amount: float) -> dict[str, Any]:
    """Seconds and rate, or why it does not run here: a peer's refusal is a result."""
    try:
        seconds = seconds_of(work, smoke)
    except (RuntimeError, ValueError, TypeError, ImportError, NotImplementedError) as error:
        return {"unavailable": f"{type(error).__name__}: {error}"[:300]}
    return {"seconds": seconds, unit: amount / seconds}


def machine(smoke: bool) -> Iterator[Entry]:
    """A copy and a matmul, measured."""
    device, size = device_of(smoke), 256 if smoke else 8192
    a = torch.randn(size, size, device=device).bfloat16()
    source = torch.zeros(2**20 if smoke else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    name = "cpu" if smoke else torch.cuda.get_device_name()
    capability = None if smoke else ".".join(map(str, torch.cuda.get_device_capability()))
    yield "device", {"name": name, "capability": capability, "cuda": torch.version.cuda}
    moved = 2 * source.numel() / 1e9
    yield "copy", timed(lambda: target.copy_(source), smoke, "GB_s", moved)
    yield "matmul", timed(lambda: a @ a, smoke, "TFLOP_s", 2 * size**3 / 1e12)
