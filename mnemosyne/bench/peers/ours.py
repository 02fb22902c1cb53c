"""Mnemosyne's own engine, whole: scheduler, sampler and all, over a cache that may be filled."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any, get_type_hints

import numpy as np
import torch

from mnemosyne.cache.pages import PagePool
from mnemosyne.config import EngineConfig
from mnemosyne.joining.compute import AS_THEY_ARE, Wraps
from mnemosyne.joining.rank import build_rank
from mnemosyne.joining.real import build_engine, executor_of
from mnemosyne.metrics import StepLog
from mnemosyne.request import SamplingParams

FILL_SLOTS = 4096  # slots filled at a time


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
        self.executor = wraps.executor(executor_of(rank))
        log = StepLog(config.metrics.path) if config.metrics.path else None
        self._engine = build_engine(
            rank, config, executor=self.executor, on_step=None if log is None else log.write
        )
        self._engine.measure()  # before any clock starts
        self._index: dict[int | None, int] = {}  # of requests, by their ids
        if settings["fills"]:
            fill_randomly(rank.worker.pool)
        self.about = {"version": f"torch {torch.__version__}", "fills": True, "batches": True}

    def add(self, index: int, request: dict[str, Any]) -> None:
        params = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
        ids, engine = np.array(request["ids"], dtype=np.int64), self._engine
        (checked,) = engine.intake.requests(ids, params, engine.clock())
        engine.accept(checked, is_filled=request["is_filled"])
        self._index[checked.request_id] = index

    def step(self) -> list[tuple[int, int]]:
        pieces = self._engine.step()
        return [(self._index[p.request_id], t) for p in pieces for t in p.token_ids]

    def stop(self) -> None:
        self._engine.abort("cancelled")
        self._index.clear()


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
    """The config of the engine; every prompt is computed, as it is by the peers."""
    kinds = get_type_hints(EngineConfig)
    config = EngineConfig(
        **{
            name: kinds[name](**value) if is_dataclass(kinds[name]) else value
            for name, value in values.items()
        }
    )
    return replace(config, cache=replace(config.cache, prefix="off"))


def open_engine(settings: dict[str, Any]) -> Ours:
    """See the package."""
    return Ours(settings)
