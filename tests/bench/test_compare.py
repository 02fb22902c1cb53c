"""Engines take turns; those that cannot are left out; ratios say how much better we are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from mnemosyne.bench import report
from mnemosyne.bench.cases import Case
from mnemosyne.bench.compare import Result, agreement, compare
from mnemosyne.bench.picture import draw

ABLE = {"fills": True, "batches": True}


class Scripted:
    """An engine whose tokens come after given gaps; it notes each turn."""

    def __init__(self, name: str, gaps_s: list[float], turns: list[str], **about: Any) -> None:
        self.name = name
        self.about = {**ABLE, **about}
        self._gaps_s = iter(gaps_s)
        self._turns = turns

    def ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self._turns.append(self.name)
        gap_s = next(self._gaps_s)
        times_s = [gap_s * index for index in range(1, 9)]
        return [{"added_s": 0.0, "times_s": times_s, "token_ids": [4] * 8} for _ in requests]


class Ending(Scripted):
    """An engine that ends when its gaps do."""

    def ask(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return super().ask(requests)
        except StopIteration as error:
            raise ValueError(f"{self.name} must answer") from error


def reject(name: str, error: ValueError) -> None:
    raise error


def run(
    engines: list[Any],
    cases: list[Case],
    on_failure: Callable[[str, ValueError], None] = reject,
) -> list[Result]:
    return compare(
        engines,
        cases,
        runs=3,
        requests=lambda case: case.requests(0, 10),
        on_run=lambda result, results: None,
        on_failure=on_failure,
    )


def test_engines_take_turns_and_the_median_is_shown() -> None:
    turns: list[str] = []
    engines = [Scripted("a", [1, 5, 2], turns), Scripted("b", [3, 3, 3], turns)]

    first, second = run(engines, [Case("case", (4,), 8, is_filled=False)])

    assert turns == ["a", "b"] * 3
    assert (first.engine, first.medians) == ("a", {"prefill_s": 2, "decode_ms": 2000})
    assert (second.engine, second.medians) == ("b", {"prefill_s": 3, "decode_ms": 3000})
    assert agreement([first, second]) == (8, 8)


def test_an_engine_that_cannot_fill_or_batch_is_left_out() -> None:
    turns: list[str] = []
    engines = [
        Scripted("a", [1] * 9, turns),
        Scripted("no fill", [1] * 9, turns, fills=False),
        Scripted("no batch", [1] * 9, turns, batches=False),
    ]
    cases = [Case("filled", (4,), 8, is_filled=True), Case("batch", (4, 4), 8, is_filled=False)]

    results = run(engines, cases)

    assert [(r.case, r.engine) for r in results] == [
        ("filled", "a"),
        ("filled", "no batch"),
        ("batch", "a"),
        ("batch", "no fill"),
    ]
    assert not any(r.token_ids for r in results if r.case == "filled")


def test_an_engine_that_fails_takes_no_further_turn_and_leaves_the_others() -> None:
    turns: list[str] = []
    engines = [
        Scripted("a", [1] * 9, turns),
        Ending("early", [], turns),
        Ending("late", [2], turns),
    ]
    failures: dict[str, str] = {}

    results = run(
        engines,
        [Case("first", (4,), 8, is_filled=False), Case("second", (4,), 8, is_filled=False)],
        lambda name, error: failures.update({name: str(error)}),
    )

    assert failures == {"early": "early must answer", "late": "late must answer"}
    assert [(r.case, r.engine, len(r.runs)) for r in results] == [
        ("first", "a", 3),
        ("first", "late", 1),
        ("second", "a", 3),
    ]
    assert turns == ["a", "early", "late", "a", "late", "a", "a", "a", "a"]


def test_tokens_agree_up_to_the_first_difference() -> None:
    results = [
        Result(case="c", engine=str(ids), runs=[{"decode_ms": 1.0}], token_ids=ids)
        for ids in ([1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3])
    ]

    assert agreement(results) == (2, 3)


def test_a_ratio_above_one_says_that_we_are_better(tmp_path: Path) -> None:
    results = [
        Result(case="c", engine="mnemosyne", runs=[{"decode_ms": 2.0, "tokens_per_s": 30.0}]),
        Result(case="c", engine="vllm", runs=[{"decode_ms": 3.0, "tokens_per_s": 20.0}]),
    ]
    console = Console(width=120)

    with console.capture() as capture:
        report.print_table(results, console)
    report.write(tmp_path / "bench.json", {"runs": 1}, results)
    draw(results, tmp_path / "bench.png")

    assert "3.00 (1.50x)" in capture.get()
    assert "20.0 (1.50x)" in capture.get()
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["results"][1]["medians"] == {"decode_ms": 3.0, "tokens_per_s": 20.0}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
