"""The fuzzer in its short form: every door accepts or refuses, and its finds are finds."""

from __future__ import annotations

import random
import time

import pytest

from tools.fuzz.__main__ import DOORS, MAX_GROWTH_BYTES, MIN_ACCEPTED
from tools.fuzz.door import Door, fuzz


@pytest.mark.parametrize("name", DOORS)
def test_every_input_is_accepted_or_refused_by_name(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with DOORS[name]() as door:
        report = fuzz(door, 100, seed=7)

    assert report.faults == []
    assert report.num_inputs == 100
    assert report.accepted >= MIN_ACCEPTED
    assert report.growth_bytes <= MAX_GROWTH_BYTES
    assert not [record for record in caplog.records if record.exc_info], "errors were swallowed"


def test_an_error_a_wrong_control_and_a_hang_are_faults() -> None:
    def feed(given: int) -> bool:
        if given == 3:
            raise KeyError("foreign")
        if given == 5:
            time.sleep(60)
        return given % 2 == 0

    def control() -> None:
        assert len(fed) != 8, "another answer"

    fed: list[int] = []
    door = Door(
        name="made",
        draw=lambda rng: fed.append(0) or len(fed) - 1,  # type: ignore[func-returns-value]
        feed=feed,
        control=control,
        limit_s=0.05,
    )

    report = fuzz(door, 10, seed=0)

    assert report.num_accepted == 5
    assert [fault.splitlines()[0] for fault in report.faults] == [
        "input 3: 3",
        "input 5: 5",
        "input 7: 7",
    ]
    assert "KeyError" in report.faults[0]
    assert "TooSlow" in report.faults[1]
    assert "another answer" in report.faults[2]


def test_an_input_depends_on_the_seed_and_its_number_alone() -> None:
    def drawn(number: int) -> list[float]:
        found: list[float] = []
        door = Door(
            name="made",
            draw=lambda rng: found.append(rng.random()),  # type: ignore[func-returns-value]
            feed=lambda given: True,
            control=lambda: None,
        )
        fuzz(door, number, seed=4)
        return found

    assert drawn(3) == drawn(5)[:3]
    assert drawn(3)[0] == random.Random("made/4/0").random()
