"""Sizes, checks and units of the config dataclasses; every error names key, rule and value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mnemosyne.config import (
    CacheConfig,
    EngineConfig,
    MeshConfig,
    MetricsConfig,
    ScheduleConfig,
    SloConfig,
    parse_duration,
    parse_size,
)
from mnemosyne.config_generate import DemoConfig


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        (2**62 + 1, 2**62 + 1),
        (np.int64(9), 9),
        ("128", 128),
        ("128K", 2**17),
        ("1m", 2**20),
        ("1.5M", 3 * 2**19),
        (" 2 G ", 2**31),
    ],
)
def test_sizes_may_carry_a_binary_suffix(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "K", "-1", -1, "1e6", "1.3", "1.0001K", 2.5, True, "nan", "1T"]
)
def test_what_is_no_whole_number_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match=r"^cache\.max_tokens must be a whole number .*1M$"):
        parse_size(text, "cache.max_tokens")


@given(count=st.integers(0, 2**20), suffix=st.sampled_from(["K", "M", "G"]))
def test_a_suffix_multiplies_by_1024(count: int, suffix: str) -> None:
    assert parse_size(f"{count}{suffix}") == count * 1024 ** ("KMG".index(suffix) + 1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MeshConfig(tp=0), "mesh.tp must be >= 1, got 0; use 1"),
        (lambda: MeshConfig(pp=-2), "mesh.pp must be >= 1, got -2"),
        (lambda: MeshConfig(kvp=1.5), "mesh.kvp must be int, got 1.5"),
        (lambda: CacheConfig(max_tokens="lots"), "cache.max_tokens must be a whole number"),
        (lambda: CacheConfig(max_tokens=2.5), "cache.max_tokens must be int or str or None, got"),
        (lambda: CacheConfig(memory_share=1.0), "cache.memory_share must lie in (0, 1), got 1.0"),
        (lambda: CacheConfig(memory_share=float("nan")), "cache.memory_share must lie in (0, 1)"),
        (lambda: CacheConfig(page_size=0), "cache.page_size must be >= 1, got 0; 128 is usual"),
        (lambda: CacheConfig(page_size="128"), "cache.page_size must be int, got '128'"),
        (lambda: CacheConfig(page_size=128.0), "cache.page_size must be int, got 128.0"),
        (lambda: ScheduleConfig(chunk=0), "schedule.chunk must be >= 1 or 'adaptive', got 0"),
        (lambda: ScheduleConfig(chunk="some"), "schedule.chunk (when not 'adaptive') must be a"),
        (lambda: ScheduleConfig(chunk=-5), "schedule.chunk (when not 'adaptive') must be a"),
        (
            lambda: ScheduleConfig(target_tbt=0),
            "schedule.target_tbt must be a positive time, got 0",
        ),
        (lambda: ScheduleConfig(target_tbt=float("nan")), "schedule.target_tbt must be"),
        (lambda: ScheduleConfig(target_tbt=float("inf")), "schedule.target_tbt must be"),
        (lambda: ScheduleConfig(target_tbt="fast"), "schedule.target_tbt must be a positive time"),
        (lambda: ScheduleConfig(min_chunk=0), "schedule.min_chunk must lie in [1, schedule.max_"),
        (lambda: ScheduleConfig(min_chunk=64, max_chunk=32), "max_chunk=32], got 64; 32 is usual"),
        (lambda: ScheduleConfig(max_sequences=0), "schedule.max_sequences must be >= 1, got 0"),
        (
            lambda: ScheduleConfig(max_sequences=True),
            "schedule.max_sequences must be int, got True",
        ),
        (lambda: ScheduleConfig(policy="lifo"), "schedule.policy must be one of fcfs, edf, lrs, l"),
        (lambda: ScheduleConfig(long_tokens="far"), "schedule.long_tokens must be a whole number"),
        (lambda: ScheduleConfig(max_relative_slack=1), "schedule.max_relative_slack must lie in"),
        (lambda: SloConfig(ttft_scale=0), "slo.ttft_scale must be a positive number, got 0"),
        (lambda: SloConfig(ttft_min=float("inf")), "slo.ttft_min must be a positive time"),
        (lambda: MetricsConfig(path=3), "metrics.path must be str or None, got 3"),
        (
            lambda: EngineConfig(model="m", compile="full"),
            "compile must be one of auto, none, st",
        ),
        (
            lambda: EngineConfig(model="m", operators="blas"),
            "operators must be one of auto, torch, amx, avx512, avx512f, avx2, neon, got 'blas'",
        ),
        (lambda: EngineConfig(model=None), "model must be str, got None"),
        (lambda: EngineConfig(model="m", dtype="int8"), "dtype must be one of auto, float64, "),
        (lambda: EngineConfig(model="m", attention="magic"), "attention must be one of auto, "),
        (lambda: EngineConfig(model="m", cache={"page_size": 1}), "cache must be CacheConfig, got"),
        (lambda: DemoConfig(depth=1.5), "depth must lie in [0, 1], got 1.5; 0.5 is the middle"),
        (lambda: DemoConfig(num_short=-1), "num_short must be >= 0, got -1; the default is 12"),
        (lambda: DemoConfig(length="long"), "length must be a whole number"),
        (lambda: DemoConfig(dtype="half"), "dtype must be one of"),
    ],
)
def test_a_value_outside_its_rule_is_refused_by_name(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match="must") as refusal:
        make()

    assert str(refusal.value).startswith(said) or said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_numbers_of_other_libraries_are_numbers() -> None:
    schedule = ScheduleConfig(max_chunk=np.int64(512), target_tbt=np.float32(0.5))

    assert schedule.max_chunk == 512
    assert schedule.target_tbt == 0.5


def test_sizes_are_counts_once_they_are_checked() -> None:
    assert CacheConfig(max_tokens="1M").max_tokens == 2**20
    assert ScheduleConfig(chunk="2K", long_tokens="1K").chunk == 2048
    assert DemoConfig(length="64K").length == 65536


def test_times_are_seconds_once_they_are_checked() -> None:
    assert ScheduleConfig(target_tbt="200ms").target_tbt == pytest.approx(0.2)
    assert SloConfig(ttft_min="1min").ttft_min == 60.0


@pytest.mark.parametrize(("scale", "max_wait_s"), [(2.0, 0.5), (4.0, 0.75), (1.0, 0.0), (0.5, 0.0)])
def test_after_the_longest_wait_prefills_of_every_length_are_in_time(scale, max_wait_s):
    slo = SloConfig(ttft_min=1.0, ttft_scale=scale)

    assert slo.max_wait_s == max_wait_s
    for work_s in (0.0, 0.1, 1 / scale, 1.0, 100.0) if scale > 1 else ():
        assert max_wait_s + work_s <= max(1.0, scale * work_s)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30ms", 0.03), ("60s", 60.0), ("2min", 120.0), (0.5, 0.5), ("15us", 15e-6)],
)
def test_durations_may_carry_a_unit(text: float | str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "0ms", "-1s", -1, "fast", "3m", "nan", "1h"])
def test_what_is_no_positive_time_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match=r"^slo\.tbt must be a positive time, got .*30ms"):
        parse_duration(text, "slo.tbt")


def test_the_world_is_the_product_of_the_degrees() -> None:
    assert MeshConfig(pp=2, kvp=3, tp=4).world_size == 24
