"""Mnemosyne's own engine, whole: scheduler, sampler and all; only prefills may be skipped."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import is_dataclass, replace
from typing import Any, get_type_hints

import numpy as np
import torch

from mnemosyne.cache.pages import PagePool
from mnemosyne.config import EngineConfig
from mnemosyne.joining.compute import AS_THEY_ARE, Wraps
from mnemosyne.joining.rank import build_engine, build_rank
from mnemosyne.metrics import StepLog
from mnemosyne.request import Sampled, SamplingParams
from mnemosyne.runtime.executor import LocalExecutor
from mnemosyne.schedule.plan import Executor, Plan, StepResult
from mnemosyne.serve.engine import Engine

FILL_SLOTS = 4096  # slots filled at a time
ONE_STEP = 1 << 40  # a chunk that holds whole prompts


class SkippingExecutor:
    """Runs plans but for the prefill of chosen requests, whose cache holds what is there.

    Args:
        inner: runs the rest of each plan.
    """

    def __init__(self, inner: Executor) -> None:
        self.depth = inner.depth
        self.skipped: set[int] = set()  # requests
        self.skipped_s = 0.0  # predicted for the steps of which something was skipped
        self._inner = inner
        self._sampling: deque[list[int]] = deque()

    def submit(self, plan: Plan) -> None:
        """Run a plan without the chunks that are skipped."""
        skips = [c for c in plan.chunks if c.request_id in self.skipped and not c.is_decode]
        self.skipped_s += plan.predicted_s if skips else 0.0
        self._sampling.append([chunk.request_id for chunk in skips if chunk.samples])
        kept = tuple(chunk for chunk in plan.chunks if chunk not in skips)
        self._inner.submit(replace(plan, chunks=kept))

    def collect(self) -> StepResult:
        """The result of the oldest step; what was skipped samples token 0."""
        result = self._inner.collect()
        made_up = {request_id: Sampled(0) for request_id in self._sampling.popleft()}
        return replace(result, sampled={**result.sampled, **made_up})


class Ours:
    """An engine over one process (see the package).

    Args:
        settings: threads, whether caches are filled, and the engine's config.
        wraps: what a profile puts around its parts.
    """

    def __init__(self, settings: dict[str, Any], wraps: Wraps = AS_THEY_ARE) -> None:
        torch.set_num_threads(settings["threads"])
        config = _engine_config(settings["engine"])
        rank = build_rank(config, wraps=wraps)
        built = build_engine(rank, config)
        built.measure()  # before any clock starts
        self.executor = SkippingExecutor(wraps.executor(LocalExecutor(rank.worker)))
        log = StepLog(config.metrics.path) if config.metrics.path else None
        self._engine = Engine(
            built.scheduler,
            self.executor,
            built.intake,
            clock=self._clock,
            on_step=None if log is None else log.write,
        )
        self._index: dict[int | None, int] = {}
        if settings["fills"]:
            fill_randomly(rank.worker.pool)
        self.about = {"version": f"torch {torch.__version__}", "fills": True, "batches": True}

    def add(self, index: int, request: dict[str, Any]) -> None:
        params = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
        output = self._engine.add(np.array(request["ids"], dtype=np.int64), params)[0]
        assert output.request_id is not None, "a prompt that is refused raises"
        self._index[output.request_id] = index
        if request["is_filled"]:
            self.executor.skipped.add(output.request_id)

    def step(self) -> list[tuple[int, int]]:
        if self.executor.skipped:
            return self._skip_prefills()
        pieces = self._engine.step()
        return [(self._index[p.request_id], t) for p in pieces for t in p.token_ids]

    def stop(self) -> None:
        self._engine.abort("cancelled")
        self._index.clear()

    def _clock(self) -> float:
        """Seconds, as if skipped steps had taken what was predicted: they teach nothing."""
        return time.perf_counter() + self.executor.skipped_s

    def _skip_prefills(self) -> list[tuple[int, int]]:
        """One step that admits all filled requests and passes over their prompts."""
        scheduler = self._engine.scheduler
        rule, scheduler.config.chunk = scheduler.config.chunk, ONE_STEP
        pieces = self._engine.step()
        scheduler.config.chunk = rule
        self.executor.skipped.clear()
        return [(self._index[p.request_id], t) for p in pieces for t in p.token_ids]


def fill_randomly(pool: PagePool) -> None:
    """Normal keys and values in every slot, so that each read of them comes from memory."""
    generator = torch.Generator().manual_seed(0)
    num_kv_heads, _, head_dim = pool.k[0].shape
    shape = (num_kv_heads, FILL_SLOTS, head_dim)
    k_KSD, v_KSD = (
        torch.randn(shape, generator=generator).to(pool.k[0].device, pool.k[0].dtype)
        for _ in range(2)
    )
    for start in range(0, pool.padding_slot, FILL_SLOTS):
        stop = min(start + FILL_SLOTS, pool.padding_slot)
        for layer in range(len(pool.k)):
            pool.k[layer][:, start:stop] = k_KSD[:, : stop - start]
            pool.v[layer][:, start:stop] = v_KSD[:, : stop - start]


def _engine_config(values: dict[str, Any]) -> EngineConfig:
    kinds = get_type_hints(EngineConfig)
    return EngineConfig(
        **{
            name: kinds[name](**value) if is_dataclass(kinds[name]) else value
            for name, value in values.items()
        }
    )


def open_engine(settings: dict[str, Any]) -> Ours:
    """See the package."""
    return Ours(settings)
