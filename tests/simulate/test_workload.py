"""Workloads are drawn from the stated quantiles; traces are read strictly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mnemosyne.config_simulate import (
    EfficiencyConfig,
    HardwareConfig,
    WorkloadConfig,
)
from mnemosyne.simulate.workload import Arrival, as_row, draw, read_trace, write_trace
from tests.simulate.machines import IDEAL, ROUND


def test_a_drawn_workload_has_the_stated_quantiles_and_rate() -> None:
    config = WorkloadConfig(num_requests=20_000, rate=2.0)

    arrivals = draw(config)

    prompts = np.array([arrival.prompt_tokens for arrival in arrivals])
    outputs = np.array([arrival.output_tokens for arrival in arrivals])
    longs = prompts[prompts >= 128 * 1024]
    assert arrivals[-1].arrival_s / 20_000 == pytest.approx(0.5, rel=0.03)
    assert len(longs) / 20_000 == pytest.approx(0.05, abs=0.005)
    assert np.median(longs) == pytest.approx(2**18.5, rel=0.05)
    assert np.median(prompts[prompts < 128 * 1024]) == pytest.approx(1730, rel=0.03)
    assert np.percentile(outputs, 90) == pytest.approx(834, rel=0.03)


def test_the_rate_moves_the_same_requests_closer_together() -> None:
    slow, fast = (draw(WorkloadConfig(rate=rate, num_requests=50)) for rate in (0.5, 2.0))

    assert [a.prompt_tokens for a in slow] == [a.prompt_tokens for a in fast]
    assert slow[-1].arrival_s == pytest.approx(4 * fast[-1].arrival_s)


def test_a_prompt_of_ten_million_ids_takes_no_memory() -> None:
    request = Arrival(0.0, 10_000_000, 1).request(0)

    assert request.num_prompt_tokens == 10_000_000
    assert request.prompt_ids.base is not None
    assert request.prompt_ids.strides == (0,)


def test_a_written_trace_reads_back_in_order_of_arrival(tmp_path: Path) -> None:
    arrivals = [Arrival(2.0, 30, 4, priority=1), Arrival(0.5, 70, 1, deadline_s=3.0)]
    path = tmp_path / "trace.jsonl"

    write_trace(path, [as_row(arrival) | {"ttft_s": 0.1} for arrival in arrivals])

    assert read_trace(path) == arrivals[::-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "trace.jsonl:2 must be a JSON object, got '{'"),
        ("[1]", "trace.jsonl:2 must be a JSON object, got '[1]'"),
        ('{"prompt_token": 3}', "trace.jsonl:2: field must be one of arrival_s, prompt_tokens"),
        ('{"prompt_token": 3}', "got 'prompt_token'; did you mean prompt_tokens?"),
        ("{}", "trace.jsonl:2: arrival_s must be a number of seconds >= 0, got None"),
        ('{"arrival_s": -1}', "trace.jsonl:2: arrival_s must be a number of seconds >= 0, got -1"),
        ('{"arrival_s": NaN}', "arrival_s must be a number of seconds >= 0, got nan"),
        ('{"arrival_s": 1}', "trace.jsonl:2: prompt_tokens must be a whole number >= 1, got None"),
        ('{"arrival_s": 1, "prompt_tokens": 2.5}', "prompt_tokens must be a whole number >= 1"),
        (
            '{"arrival_s": 1, "prompt_tokens": 2, "output_tokens": 0}',
            "trace.jsonl:2: output_tokens must be a whole number >= 1, got 0",
        ),
    ],
)
def test_a_line_that_is_no_request_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    good = json.dumps(as_row(Arrival(0.0, 1, 1)))
    path.write_text(f"{good}\n{line}\n")

    with pytest.raises(ValueError, match="must be") as refusal:
        read_trace(path)

    assert said in str(refusal.value)


def test_a_trace_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")

    with pytest.raises(ValueError, match=r"trace must be a readable JSONL file, .*No such file"):
        read_trace(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="must hold at least one request"):
        read_trace(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("kind", "whole", "changes", "said"),
    [
        (WorkloadConfig, None, {"rate": 0.0}, "workload.rate must be a positive number, got 0.0"),
        (WorkloadConfig, None, {"long_share": 2.0}, "workload.long_share must lie in [0, 1]"),
        (WorkloadConfig, None, {"long_max": 5}, "workload.long_max must be at least workload.lo"),
        (WorkloadConfig, None, {"long_min": "far"}, "workload.long_min must be a whole number"),
        (HardwareConfig, ROUND, {"memory_gb": -1.0}, "hardware.memory_gb must be a positive nu"),
        (EfficiencyConfig, IDEAL, {"kv": 1.2}, "efficiency.kv must lie in (0, 1], got 1.2"),
        (EfficiencyConfig, IDEAL, {"step_overhead": "-1s"}, "efficiency.step_overhead must be a"),
    ],
)
def test_a_value_outside_its_rule_is_refused_by_name(
    kind: type, whole: object, changes: dict[str, object], said: str
) -> None:
    fields = {} if whole is None else {f: getattr(whole, f) for f in kind.__dataclass_fields__}

    with pytest.raises(ValueError, match="must") as refusal:
        kind(**fields | changes)

    assert str(refusal.value).startswith(said)
