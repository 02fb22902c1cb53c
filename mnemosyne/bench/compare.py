"""Engines in turns over the same cases: the measurements of each run, and the medians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mnemosyne.bench.cases import Answers, Case, Numbers
from mnemosyne.bench.process import EngineProcess


@dataclass(kw_only=True, slots=True)
class Result:
    """One engine on one case."""

    case: str
    engine: str
    runs: list[Numbers] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # greedy, of the first request

    @property
    def medians(self) -> Numbers:
        return {name: median(run[name] for run in self.runs) for name in self.runs[0]}


def compare(
    engines: Sequence[EngineProcess],
    cases: Sequence[Case],
    *,
    runs: int,
    requests: Callable[[Case], Any],
    on_run: Callable[[Result, Sequence[Result]], None],
    on_failure: Callable[[str, ValueError], None],
) -> list[Result]:
    """Run every case on every engine that can, one after the other, then the whole round again.

    Args:
        engines: open.
        cases: what to serve.
        runs: of each engine and case.
        requests: the requests of a case, the same for every engine.
        on_run: called after each run with its result so far, and all results.
        on_failure: called with the name of an engine that fails, which takes no further turn, and
            the reason; what it raises ends the comparison.

    Returns:
        One result per case and engine with a run.
    """
    results: list[Result] = []
    failed: set[str] = set()
    for case in cases:
        asked = requests(case)
        able = [engine for engine in engines if can_run(engine.about, case)]
        found = [Result(case=case.name, engine=engine.name) for engine in able]
        results += found
        for _ in range(runs):
            for engine, result in zip(able, found, strict=True):
                if engine.name in failed:
                    continue
                try:
                    _run(engine, case, asked, result)
                except ValueError as error:
                    failed.add(engine.name)
                    on_failure(engine.name, error)
                else:
                    on_run(result, [r for r in results if r.runs])
    return [result for result in results if result.runs]


def _run(engine: EngineProcess, case: Case, asked: Any, result: Result) -> None:
    answers: Answers = engine.ask(asked)
    result.runs.append(case.numbers(answers))
    # over a cache of random keys each engine has its own
    result.token_ids = [] if case.is_filled else answers[0]["token_ids"]


def can_run(about: dict[str, Any], case: Case) -> bool:
    """Return whether an engine can do what a case needs."""
    return (about["fills"] or not case.is_filled) and (about["batches"] or not case.is_batch)


def agreement(results: Sequence[Result]) -> tuple[int, int]:
    """The number of first greedy tokens on which all engines agree, and of all there are.

    Args:
        results: of one case.
    """
    counted = min(len(result.token_ids) for result in results)
    columns = list(zip(*(result.token_ids[:counted] for result in results), strict=True))
    same = next((i for i, column in enumerate(columns) if len(set(column)) > 1), counted)
    return same, counted
