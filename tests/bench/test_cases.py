"""Requests of a case, and what is read off the times of their tokens."""

from __future__ import annotations

from typing import Any

import pytest

from mnemosyne.bench.cases import Case, make_cases
from mnemosyne.config_bench import BenchConfig


def answer(added_s: float, times_s: list[float]) -> dict[str, Any]:
    return {"added_s": added_s, "times_s": times_s, "token_ids": [0] * len(times_s)}


def test_each_length_is_a_case_and_its_ids_depend_on_the_seed_alone() -> None:
    cases = make_cases(BenchConfig(lengths=["1K", 5], batch=2))

    assert [case.name for case in cases] == ["2 x 1K", "2 x 5"]
    assert cases[1].requests(3, 100) == cases[1].requests(3, 100)
    assert cases[1].requests(3, 100) != cases[1].requests(4, 100)
    assert [len(request["ids"]) for request in cases[1].requests(3, 100)] == [5, 5]


def test_decodes_beside_a_prompt_are_spread_over_the_lengths() -> None:
    (case,) = make_cases(BenchConfig(lengths=["4K", "64K"], batch=5, beside="2K", prefill=False))

    requests = case.requests(0, 100)

    assert case.name == "5 decodes and a prompt of 2K, filled cache"
    assert [len(r["ids"]) for r in requests] == [4096, 8192, 16384, 32768, 65536, 2048]
    assert [r["is_filled"] for r in requests] == [True] * 5 + [False]
    assert [r["after"] for r in requests] == [0] * 5 + [4]


def test_prefill_ends_with_the_first_token_and_a_decode_is_the_median_gap() -> None:
    case = Case("one", (5,), 9, is_filled=False)
    times_s = [2.0, 2.9, 3.0, 3.1, 3.2, 3.3, 3.4, 3.6, 3.8]

    numbers = case.numbers([answer(0.5, times_s)])

    assert numbers == pytest.approx({"prefill_s": 1.5, "decode_ms": 150.0})


def test_tokens_of_a_batch_count_while_all_decode() -> None:
    case = Case("two", (5, 5), 8, is_filled=True)
    early, late = [float(t) for t in range(8)], [float(t) for t in range(2, 10)]

    numbers = case.numbers([answer(0, early), answer(0, late)])

    # from 6, the fifth token of the late one, to 7, the last of the early one
    assert numbers == pytest.approx({"decode_ms": 1000.0, "tokens_per_s": 2.0})


def test_beside_a_prompt_only_what_happens_during_its_prefill_counts() -> None:
    case = Case("beside", (5, 5), 100, is_filled=True, beside=40)
    decode = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 9.0]

    numbers = case.numbers([answer(0, decode), answer(0, decode), answer(4.0, [8.0])])

    assert numbers == pytest.approx(
        {"prefill_s": 4.0, "decoded_per_s": 1.0, "tokens_per_s": 11.0, "gap_p95_ms": 2000.0}
    )


@pytest.mark.parametrize("beside", [None, 4])
def test_an_engine_that_gives_other_tokens_than_asked_is_no_result(beside: int | None) -> None:
    case = Case("short", (5, 5), 8, is_filled=False, beside=beside)
    cut_off = answer(0, [1.0, 2.0])

    with pytest.raises(ValueError, match="short: an engine must give the tokens"):
        case.numbers([answer(0, [float(t) for t in range(8)]), cut_off])


def test_a_batch_that_never_decodes_together_is_no_result() -> None:
    case = Case("apart", (5, 5), 8, is_filled=False)
    early, late = [float(t) for t in range(8)], [float(t) for t in range(20, 28)]

    with pytest.raises(ValueError, match="max_tokens must let all requests of apart"):
        case.numbers([answer(0, early), answer(0, late)])
