"""One server over the needle model for the tests of this room, and the same model offline."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from mnemosyne.llm import LLM
from tools.live_server import Live, serving

NUM_TOKENS = 4096  # of the cache


def open_needle() -> LLM:
    return LLM(
        "needle",
        dtype="float64",
        device="cpu",
        schedule={"chunk": 64},
        cache={"max_tokens": NUM_TOKENS, "page_size": 32},
    )


@pytest.fixture(scope="package")
def offline() -> Iterator[LLM]:
    with open_needle() as llm:
        yield llm


@pytest.fixture(scope="package")
def live() -> Iterator[Live]:
    with open_needle() as llm, serving(llm.engine, keep_alive=0.3, access_log=False) as live:
        yield live


@pytest.fixture
def client(live: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as client:
        yield client


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=60) as client:
        yield client
