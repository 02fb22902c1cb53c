"""Long bodies: read in a process apart, refused early, and left when their client is."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from tests.server.conftest import open_needle
from tests.server.test_streams import WAIT_S, post_raw, until
from tools.live_server import Live, serving

LONG = 100_000  # bytes, more than are kept in memory


def test_a_long_body_is_read_as_a_short_one(live: Live, offline: LLM) -> None:
    text = "the door code is monday . " * 100
    body = json.dumps({"prompt": text, "max_tokens": 3, "seed": 1, "temperature": 1})
    expected = offline.generate(text, SamplingParams(max_tokens=3, seed=1, temperature=1.0))[0]

    response = httpx.post(
        f"{live.url}/v1/completions", content=body + " " * LONG, timeout=WAIT_S
    ).json()

    assert response["choices"][0]["text"] == expected.text
    assert response["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_the_ids_of_a_long_text_are_those_of_its_parts(live: Live) -> None:
    def tokens(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        made = httpx.post(f"{live.url}/tokenize", json=body, timeout=WAIT_S).json()
        assert made["count"] == len(made["tokens"])
        return list(made["tokens"])

    part = tokens("the door code is monday . ")

    assert tokens("the door code is monday . " * 5000) == part * 5000


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([5] * LONG, "fit the cache of 4096 tokens, got 100000 + 16 = 100016"),
        ([5] * LONG + [-1], "prompt ids must lie in [0, "),
        ([5] * LONG + ["x"], "prompt must be text or a flat list of token ids"),
        ("door " * LONG, "fit the cache of 4096 tokens, got 100001 + 16 = 100017"),
    ],
)
def test_a_long_body_is_refused_as_a_short_one(live: Live, prompt: object, said: str) -> None:
    response = httpx.post(f"{live.url}/v1/completions", json={"prompt": prompt}, timeout=WAIT_S)

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_ids_that_no_model_holds_are_counted_before_they_are_read() -> None:
    ids = [5] * 3_000_000
    with open_needle() as llm:
        llm.engine.intake.max_positions = 4096
        with serving(llm.engine) as live:
            response = httpx.post(f"{live.url}/v1/completions", json={"prompt": ids}, timeout=60)

    assert response.status_code == 400
    assert "fit the model's 4096 positions, got 3000000 tokens" in response.text


def test_short_prompts_do_not_wait_for_a_long_one(live: Live) -> None:
    made = post_raw(live, {"prompt": "door " * 2_000_000, "max_tokens": 1})

    response = httpx.post(
        f"{live.url}/v1/completions", json={"prompt": "door", "max_tokens": 1}, timeout=WAIT_S
    )

    assert response.status_code == 200
    assert live.service.gate.num_taken == 1, "the long one is still being read"
    made.close()
    until(lambda: live.service.gate.num_taken == 0)
    after = httpx.post(
        f"{live.url}/v1/completions", content=b'{"prompt": "door"}' + b" " * LONG, timeout=WAIT_S
    )
    assert after.status_code == 200


def test_health_is_answered_while_a_long_text_is_read(live: Live) -> None:
    made = post_raw(live, {"prompt": "door " * 2_000_000, "max_tokens": 1})
    with httpx.Client(base_url=live.url, timeout=WAIT_S) as client:
        for _ in range(20):
            assert client.get("/health").status_code == 200
            time.sleep(0.01)

        assert live.service.gate.num_taken == 1, "the long one is still being read"
    made.close()
    until(lambda: live.service.gate.num_taken == 0)
