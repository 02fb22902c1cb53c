"""Limits of a server, and its end."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import httpx
import pytest

from mnemosyne.config_serve import HttpConfig
from mnemosyne.server.errors import ApiError
from mnemosyne.server.keys import Keys
from tests.server.conftest import open_needle
from tests.server.test_streams import WAIT_S, braked, events, until
from tools.live_server import serving

ASKED = {"prompt": [5, 6], "max_tokens": 2}


def test_every_inference_route_wants_a_key_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha\nbeta\n")
    paths = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/drain")
    with (
        open_needle() as llm,
        serving(llm.engine, api_keys=str(tmp_path / "keys")) as live,
        httpx.Client(base_url=live.url, timeout=WAIT_S) as client,
    ):
        refused = [client.post(path, json=ASKED) for path in paths]
        refused += [client.get("/v1/models"), client.get("/v1/models/needle")]
        wrong = {"Authorization": "Bearer gamma"}
        refused.append(client.post("/v1/completions", json=ASKED, headers=wrong))
        good = {"Authorization": "Bearer beta"}

        served = client.post("/v1/completions", json=ASKED, headers=good)

        assert [response.status_code for response in refused] == [401] * len(refused)
        assert all("Bearer KEY" in response.json()["error"]["message"] for response in refused)
        assert served.status_code == 200
        assert client.get("/health").status_code == 200


def test_keys_share_no_cached_prefix_and_each_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha\nbeta\n")
    asked = ASKED | {"prompt": list(range(3, 300)), "max_tokens": 1}
    headers = [{"Authorization": f"Bearer {key}"} for key in ("alpha", "beta", "beta", "alpha")]
    with (
        open_needle() as llm,
        serving(llm.engine, api_keys=str(tmp_path / "keys")) as live,
        httpx.Client(base_url=live.url, timeout=WAIT_S) as client,
    ):
        answers = [client.post("/v1/completions", json=asked, headers=h).json() for h in headers]
        salted = client.post(
            "/v1/completions", json=asked | {"cache_salt": "other"}, headers=headers[0]
        ).json()

    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in (*answers, salted)]
    assert cached[:2] == [0, 0]
    assert min(cached[2:4]) > 0
    assert cached[4] == 0


def test_a_key_has_its_requests_and_tokens_of_a_minute(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("alpha beta")
    clock = [0.0]
    keys = Keys(str(tmp_path / "keys"), 2, 100, lambda: clock[0])
    alpha, beta = keys.check("Bearer alpha"), keys.check("bearer beta")
    for _ in range(2):
        keys.admit(alpha)

    with pytest.raises(ApiError, match="requests of this key must be at most 2 a minute") as error:
        keys.admit(alpha)
    keys.admit(beta)
    keys.take_tokens(beta, 250)
    with pytest.raises(ApiError, match="tokens of this key must be at most 100 a minute"):
        keys.admit(beta)
    clock[0] = 31.0
    keys.admit(alpha)

    assert error.value.status == 429
    assert error.value.headers["Retry-After"] == "1"


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    with (
        open_needle() as llm,
        serving(llm.engine, max_body=1000) as live,
        httpx.Client(base_url=live.url, timeout=WAIT_S) as client,
    ):
        known = client.post("/v1/completions", json={"prompt": "x" * 2000})
        chunked = client.post("/v1/completions", content=(b"x" * 600 for _ in range(4)))

    assert [known.status_code, chunked.status_code] == [413, 413]
    assert "body must hold at most 1,000 bytes" in known.json()["error"]["message"]


def test_a_body_whose_rest_does_not_come_is_given_up() -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with open_needle() as llm, serving(llm.engine, write_timeout=0.3) as live:
        with socket.create_connection(("127.0.0.1", live.port), timeout=WAIT_S) as made:
            made.sendall(head)

            said = b"".join(iter(lambda: made.recv(1 << 16), b"")).decode()

        until(lambda: live.service.gate.num_taken == 0)
    assert said.startswith("HTTP/1.1 408 ")
    assert "body must come without a pause of 0.3 s, got 1 bytes of it" in said


def test_too_many_requests_are_told_when_to_come_again() -> None:
    body = {"prompt": [5] * 2000, "max_tokens": 4, "stream": True}
    with braked(max_waiting=1) as (live, brake, _), httpx.Client(timeout=WAIT_S) as client:
        brake.hold_s = 0.05
        with client.stream("POST", f"{live.url}/v1/completions", json=body) as running:
            refused = client.post(f"{live.url}/v1/completions", json=ASKED)
            brake.hold_s = 0.0
            list(events(running))
        until(lambda: live.service.gate.num_taken == 0)

        served = client.post(f"{live.url}/v1/completions", json=ASKED)

    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert served.status_code == 200


def test_a_drain_lets_running_requests_finish_and_takes_no_more() -> None:
    body = {"prompt": [5] * 500, "max_tokens": 20, "stream": True, "ignore_eos": True}
    drained: list[httpx.Response] = []
    with braked() as (live, brake, llm), httpx.Client(base_url=live.url, timeout=WAIT_S) as client:
        brake.hold_s = 0.05
        with client.stream("POST", "/v1/completions", json=body) as running:
            until(lambda: llm.engine.has_work)
            thread = threading.Thread(
                target=lambda: drained.append(httpx.post(f"{live.url}/drain", timeout=WAIT_S))
            )
            thread.start()
            until(lambda: live.service.gate.is_closed)
            ready = client.get("/ready")
            refused = client.post("/v1/completions", json=ASKED)
            texts = [c for event in events(running) for c in event["choices"]]
        thread.join()

    assert ready.status_code == 503
    assert refused.status_code == 503
    assert "Retry-After" in refused.headers
    assert texts[-1]["finish_reason"] == "length"
    assert drained[0].json()["drained"] is True


def test_an_engine_that_failed_is_no_healthy_one() -> None:
    with braked() as (live, brake, _), httpx.Client(base_url=live.url, timeout=WAIT_S) as client:
        brake.hold_s = -1.0  # which no sleep takes

        answer = client.post("/v1/completions", json=ASKED)

        assert answer.status_code == 500
        assert "Traceback" not in answer.text
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json=ASKED).status_code == 503


def test_a_value_outside_its_rule_is_refused_by_name() -> None:
    for wrong, said in (
        ({"port": 70_000}, "serve.port must lie in"),
        ({"max_waiting": 0}, "serve.max_waiting must be >= 1, got 0"),
        ({"keep_alive": "soon"}, "serve.keep_alive must be a positive time"),
        ({"tls_cert": "x.pem"}, "serve.tls_cert and serve.tls_key must be given together"),
    ):
        with pytest.raises(ValueError, match=said):
            HttpConfig(**wrong)  # type: ignore[arg-type]


def test_the_access_log_shows_no_prompt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "mnemosyne")
    with open_needle() as llm, serving(llm.engine) as live:
        httpx.post(
            f"{live.url}/v1/completions", json={"prompt": "door secret", "max_tokens": 1}
        ).raise_for_status()
        until(lambda: "output_tokens=1" in caplog.text)

    assert "secret" not in caplog.text
    assert json.dumps("door") not in caplog.text
