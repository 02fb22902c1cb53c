"""Engines over tiny models for tests: quick to open, exact in float64; and what can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne.cache.pages import PagePool
from mnemosyne.cache.table import PageTable
from mnemosyne.llm import LLM
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.request import Piece, RequestOutput, SamplingParams
from mnemosyne.runtime.executor import LocalExecutor
from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Executor, Plan, StepResult
from mnemosyne.serve.engine import Engine
from tests.model_zoo.tiny import VOCAB_SIZE

PAGE_SIZE = 16


def open_tiny(
    path: Path,
    *,
    chunk: int | str = 7,
    max_tokens: int = 2048,
    cache: dict[str, Any] | None = None,
    **options: Any,
) -> LLM:
    """An LLM in float64 over a checkpoint of ``tiny_checkpoint``, with small pages.

    Args:
        path: the checkpoint.
        chunk: the chunk rule; a fixed one needs no sweep at start-up.
        max_tokens: of the cache.
        cache: further fields of ``CacheConfig``.
        options: fields of ``ScheduleConfig``, and arguments of ``LLM`` among ``device``,
            ``attention``, ``compile``, ``on_step``, ``metrics``, ``operators``, ``predictor``.
    """
    arguments = {"device": "cpu"} | {
        name: options.pop(name)
        for name in (
            "device",
            "attention",
            "compile",
            "metrics",
            "on_step",
            "operators",
            "predictor",
        )
        if name in options
    }
    return LLM(
        str(path),
        dtype="float64",
        schedule={"chunk": chunk, **options},
        cache={"max_tokens": max_tokens, "page_size": PAGE_SIZE} | (cache or {}),
        **arguments,
    )


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Prompts of the tiny vocabulary, int64."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, length) for length in lengths]


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, **fields)


def add(engine: Engine, prompt: Any, params: SamplingParams) -> RequestOutput:
    """Add a prompt that gives one sample."""
    (output,) = engine.add(prompt, params)
    return output


def drain(engine: Engine) -> list[list[Piece]]:
    """Step until nothing is left; the pieces of each step."""
    steps = []
    while engine.has_work:
        steps.append(engine.step())
    return steps


def pages_used(engine: Engine) -> int:
    """Pages that requests hold."""
    return engine.scheduler.ledger.num_used


def worker_of(llm: LLM) -> Worker:
    """The rank that runs the steps."""
    executor = llm.engine._executor
    assert isinstance(executor, LocalExecutor)
    return executor.worker


def model_of(llm: LLM) -> Decoder:
    model = worker_of(llm)._model
    assert isinstance(model, Decoder)
    return model


def pool_of(llm: LLM) -> PagePool:
    return worker_of(llm)._pool


def table_of(llm: LLM, output: RequestOutput) -> PageTable:
    """Where the cache of a running request lies."""
    assert output.request_id is not None
    return worker_of(llm)._sequences[output.request_id].table


class WrappedExecutor:
    """An executor that calls a function before and after each step of another one.

    Args:
        engine: its executor is replaced by this one.
        before: called with each plan before it runs.
        after: called with each plan once it ran; its result is not collected yet.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        before: Callable[[Plan], None] = lambda plan: None,
        after: Callable[[Plan], None] = lambda plan: None,
    ) -> None:
        self.inner: Executor = engine._executor
        self._before = before
        self._after = after
        engine._executor = self

    @property
    def depth(self) -> int:
        return self.inner.depth

    def submit(self, plan: Plan) -> None:
        self._before(plan)
        self.inner.submit(plan)
        self._after(plan)

    def collect(self) -> StepResult:
        return self.inner.collect()
