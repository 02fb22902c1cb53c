"""Settings of every section, and the time that work takes on the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from mnemosyne.kernels.tile import TileConfig
from mnemosyne.runtime.graphs import CudaGraph, Graph

Entry = tuple[str, dict[str, Any]]  # what was looked at, and what came out

REFUSALS = (RuntimeError, ValueError, TypeError, ImportError, TritonError)
SAMPLES = 7
SAMPLE_S = 0.005  # a launch of microseconds is repeated until it can be timed


@dataclass(frozen=True, slots=True)
class Setting:
    """A GPU; or the CPU and tiny shapes, in Triton's interpreter, which shows that all runs."""

    smoke: bool
    configs: Mapping[str, TileConfig] = field(default_factory=dict)  # the fastest, by shape_key

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.smoke else "cuda")

    @property
    def capability(self) -> int | None:
        """Major compute capability; None in a smoke run."""
        return None if self.smoke else torch.cuda.get_device_capability()[0]

    def new_graph(self) -> Graph:
        """A CUDA graph with memory of its own; in a smoke run, what stands in for one."""
        if self.smoke:
            return Again()
        return CudaGraph(self.device, torch.cuda.graph_pool_handle())

    def timed(self, work: Callable[[], object], unit: str, amount: float) -> dict[str, Any]:
        """Seconds and rate, or why it does not run here: a peer's refusal is a result.

        On a GPU what is launched is replayed as a graph: small work launched one by one would
        show the time of the host. What cannot be captured is launched, and the entry says so.
        """
        try:
            work()
            if self.smoke:
                return _rate(_clocked(work), unit, amount)
            replay = replay_of(work)
            rate = _rate(median_seconds(replay or work), unit, amount)
            return rate if replay else rate | {"launched": True}
        except REFUSALS as error:
            return refusal(error)


class Again:
    """Stands in for a CUDA graph on a CPU: it calls again what it captured."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """See ``Graph``."""
        self._run, self._result = run, run()
        return self._result

    def replay(self) -> None:
        """See ``Graph``."""
        self._result.copy_(self._run())


def refusal(error: Exception) -> dict[str, Any]:
    """The entry of what does not run here, such as a config that takes too much memory."""
    return {"unavailable": f"{type(error).__name__}: {error}"[:300]}


def replay_of(work: Callable[[], object]) -> Callable[[], None] | None:
    """Launches again all that ``work`` launches, which ran before; None if it asks the host."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def median_seconds(work: Callable[[], object]) -> float:
    """Median over samples of some milliseconds each, by CUDA events."""
    calls = max(1, int(SAMPLE_S / _sample(work, 1)))
    return statistics.median(_sample(work, calls) for _ in range(SAMPLES))


def _sample(work: Callable[[], object], calls: int) -> float:
    """Seconds of one of some calls in a row."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    start.record()
    for _ in range(calls):
        work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000 / calls


def _clocked(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


def _rate(seconds: float, unit: str, amount: float) -> dict[str, Any]:
    return {"seconds": seconds, unit: amount / seconds}
