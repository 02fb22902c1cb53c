"""Stages hold every layer once, and no other cut has a faster slowest stage."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.model_zoo.stages import cut_stages, stage_layers


def lengths(stages: list[range]) -> list[int]:
    return [len(stage) for stage in stages]


@pytest.mark.parametrize(
    ("num_layers", "pp", "last_extra", "expected"),
    [
        (4, 1, 0.0, [4]),
        (4, 2, 0.0, [2, 2]),
        (5, 2, 0.0, [2, 3]),
        (7, 3, 0.0, [2, 2, 3]),
        (11, 4, 0.0, [2, 3, 3, 3]),
        (3, 3, 5.0, [1, 1, 1]),
    ],
)
def test_layers_that_do_not_divide_go_to_later_stages(
    num_layers: int, pp: int, last_extra: float, expected: list[int]
) -> None:
    stages = stage_layers([1.0] * num_layers, pp, last_extra=last_extra)

    assert lengths(stages) == expected


@pytest.mark.parametrize(
    ("num_layers", "pp", "last_extra", "expected"),
    [
        (5, 2, 0.5, [3, 2]),
        (4, 2, 2.9, [3, 1]),
        (4, 2, 0.9, [2, 2]),
        (7, 3, 0.2, [2, 3, 2]),
        (32, 4, 3.0, [8, 9, 9, 6]),
    ],
)
def test_a_heavy_head_lightens_the_last_stage(
    num_layers: int, pp: int, last_extra: float, expected: list[int]
) -> None:
    stages = stage_layers([1.0] * num_layers, pp, last_extra=last_extra)

    assert lengths(stages) == expected


@given(
    times=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=9),
    pp=st.integers(1, 9),
    last_extra=st.floats(0.0, 10.0),
)
def test_no_other_cut_has_a_faster_slowest_stage(
    times: list[float], pp: int, last_extra: float
) -> None:
    pp = min(pp, len(times))

    def slowest(cuts: tuple[int, ...]) -> float:
        work = [sum(times[a:b]) for a, b in pairwise((0, *cuts, len(times)))]
        return max(*work[:-1], work[-1] + last_extra, 0.0)

    stages = stage_layers(times, pp, last_extra=last_extra)

    assert [layer for stage in stages for layer in stage] == list(range(len(times)))
    assert all(stages)
    best = min(slowest(cuts) for cuts in combinations(range(1, len(times)), pp - 1))
    assert slowest(tuple(stage.start for stage in stages[1:])) <= best * (1 + 1e-6)


def test_the_head_weighs_little_unless_told_otherwise() -> None:
    spec = bench_spec()  # its head has the weights of 2.8 layers

    assert lengths(cut_stages(spec, 2)) == [2, 2]
    assert lengths(stage_layers([1.0] * 4, 2, last_extra=2.8)) == [3, 1]
    assert cut_stages(spec, 1) == [range(4)]
