"""The page /openapi.json says what the server does: schemathesis finds no other answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mnemosyne.llm import LLM
from tools.live_server import serving

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    cache = {"max_tokens": 256, "page_size": 16}
    with (
        LLM("needle", device="cpu", schedule={"chunk": 64}, cache=cache) as llm,
        serving(llm.engine, access_log=False, max_tokens=4) as live,
    ):
        yield schemathesis.openapi.from_url(f"{live.url}/openapi.json")


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/cache/clear"),
    *(("GET", path) for path in ("/v1/models", "/v1/models/{model_id}", "/health", "/ready")),
    *(("GET", path) for path in ("/metrics", "/version")),
]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_one_that_the_page_describes(page: Any, method: str, path: str) -> None:
    @given(case=page[path][method].as_strategy())
    @settings(max_examples=15, suppress_health_check=list(HealthCheck))
    def ask(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    ask()


def test_no_route_but_the_end_of_the_server_is_left_out(page: Any) -> None:
    described = {(o.ok().method.upper(), o.ok().path) for o in page.get_all_operations()}

    assert described == {*OPERATIONS, ("POST", "/drain")}
