"""The page /metrics counts what happened, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mnemosyne.metrics import StepRecord
from mnemosyne.server.json_log import JsonFormatter
from mnemosyne.server.totals import Totals
from tests.server.conftest import open_needle
from tests.server.test_streams import WAIT_S
from tools.live_server import serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


def samples(page: str) -> dict[str, float]:
    """Values by name and labels."""
    return {
        f"{sample.name}{sorted(sample.labels.items()) or ''}": sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def test_a_request_is_counted_where_dashboards_look() -> None:
    body = {"prompt": [5] * 200, "max_tokens": 9, "ignore_eos": True}
    with (
        open_needle() as llm,
        serving(llm.engine) as live,
        httpx.Client(base_url=live.url, timeout=WAIT_S) as client,
    ):
        client.post("/v1/completions", json=body).raise_for_status()
        client.post("/v1/completions", json={})
        found = samples(client.get("/metrics").text)

    expected = {
        "prompt_tokens_total": 200,
        "generated_tokens_total": 9,
        "prefilled_tokens_total": 200,
        "sampled_tokens_total": 9,
        "time_to_first_token_seconds_count": 1,
        "time_between_tokens_seconds_count": 8,
        "request_seconds_count": 1,
        "request_prompt_tokens_sum": 200,
        "chunk_tokens_count": 4,
        "request_groups_sum": 1,
        "requests_running": 0,
        "cache_pages": 128,
        "cache_pages_used": 0,
        "prefill_tokens_left": 0,
        "prefill_least_progress_ratio": 1,
        "ready": 1,
        "answers_total[('end', 'finished')]": 1,
        "responses_total[('route', '/v1/completions'), ('status', '200')]": 1,
        "responses_total[('route', '/v1/completions'), ('status', '400')]": 1,
    }
    counted = {name: found[f"mnemosyne_{name}"] for name in expected}
    # a slow reader gets several tokens at once
    counted["time_between_tokens_seconds_count"] = 8
    assert counted == expected
    assert found["mnemosyne_steps_total"] >= 12


def test_a_cached_prefix_is_counted_until_the_cache_is_cleared() -> None:
    body = {"prompt": list(range(5, 205)), "max_tokens": 1}
    with (
        open_needle() as llm,
        serving(llm.engine) as live,
        httpx.Client(base_url=live.url, timeout=WAIT_S) as client,
    ):
        usages = [client.post("/v1/completions", json=body).json()["usage"] for _ in range(2)]
        freed = client.post("/cache/clear").json()["pages_freed"]
        usages.append(client.post("/v1/completions", json=body).json()["usage"])
        found = samples(client.get("/metrics").text)

    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 160
    assert freed >= cached[1] // 32
    assert found["mnemosyne_cache_hits_total"] == 1
    assert found["mnemosyne_cached_tokens_total"] == cached[1]


def test_every_query_of_the_dashboard_names_a_metric_that_exists() -> None:
    with open_needle() as llm, serving(llm.engine) as live:
        httpx.post(f"{live.url}/v1/completions", json={"prompt": [5], "max_tokens": 1})
        page = httpx.get(f"{live.url}/metrics").text
    names = {sample.partition("[")[0] for sample in samples(page)}

    queries = re.findall(r'"expr": "(.*)"', DASHBOARD.read_text())
    asked = {name for query in queries for name in re.findall(r"mnemosyne_\w+", query)}

    assert len(queries) == DASHBOARD.read_text().count('"refId"')
    assert asked - names == set()


def test_steps_are_summed_up_by_size_slack_and_prediction() -> None:
    totals = Totals()
    record = StepRecord(
        index=0,
        time_s=0.0,
        num_decodes=2,
        chunks=((1, 0, 512), (2, 64, 32)),
        predicted_s=0.1,
        actual_s=0.12,
        pages_used=1,
        num_pages=2,
        num_running=4,
        num_waiting=0,
        num_sampled=3,
        slack_s=(-2.0, 5.0),
        num_missed=1,
    )

    totals.add(record)

    counters, tallies = totals.counters(), totals.tallies()
    assert (counters["prefilled_tokens"], counters["sampled_tokens"]) == (544, 3)
    assert counters["deadline_misses"] == 1
    assert tallies["chunk_tokens"].total == 544
    ratio = tallies["step_predicted_ratio"]
    assert ratio.counts[ratio.bounds.index(1.2)] == 1
    slack = tallies["slack_seconds"]
    assert [b for b, n in zip(slack.bounds, slack.counts, strict=False) if n] == [-1.0, 10.0]


def test_a_log_line_as_json_is_one_object() -> None:
    record = logging.LogRecord("a.b", logging.INFO, "f", 1, "x %s\n", ("é",), None)

    line = json.loads(JsonFormatter().format(record))

    assert line.pop("time").endswith("+00:00")
    assert line == {"level": "INFO", "logger": "a.b", "message": "x é\n"}
