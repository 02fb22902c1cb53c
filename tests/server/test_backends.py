"""Clients of a backend that loads, refuses, is overloaded or fails; TLS; apps in apps."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from mnemosyne.config_serve import HttpConfig
from mnemosyne.server.app import create_app
from mnemosyne.server.backend import About, Event, Job, Overloaded, Status
from mnemosyne.server.run import HttpServer
from tests.server.conftest import open_needle
from tests.server.test_streams import WAIT_S, events
from tools.live_server import serving

ABOUT = About(
    model="played",
    version="0",
    vocab_size=100,
    max_model_len=64,
    max_request_tokens=32,
    num_pages=2,
    page_size=16,
)
ASKED = {"prompt": [5, 6], "max_tokens": 3}


class Played:
    """A backend whose events are written down beforehand.

    Args:
        script: what each job brings: events, seconds to wait, or errors to raise.
    """

    def __init__(self, *script: Event | float | Exception) -> None:
        self.script = script
        self.condition = Status(is_ready=True)
        self.jobs: list[Job] = []
        self.num_closed = 0

    async def about(self) -> About:
        return ABOUT

    def status(self) -> Status:
        return self.condition

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        self.jobs.append(job)
        try:
            for item in self.script:
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
        finally:
            self.num_closed += 1

    async def drain(self, timeout_s: float) -> bool:
        return True

    async def clear_cache(self) -> int:
        return 7


def ask(backend: Played, **body: object) -> httpx.Response:
    with serving(backend) as live:
        return httpx.post(f"{live.url}/v1/completions", json={**ASKED, **body}, timeout=WAIT_S)


@pytest.mark.parametrize("stream", [True, False])
def test_a_refusal_of_the_engine_has_a_status(stream: bool) -> None:
    response = ask(Played(ValueError("prompt must be another, got this; change it")), stream=stream)

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("stream", [True, False])
def test_an_overload_says_when_to_come_again(stream: bool) -> None:
    response = ask(Played(Overloaded("jobs must be fewer, got too many; wait", 3.2)), stream=stream)

    assert response.status_code == 429
    assert response.headers["retry-after"] == "4"


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event() -> None:
    backend = Played(Event(0, (7,), "a"), 0.2, RuntimeError("secret"))

    response = ask(backend, stream=True)

    *_, said, failed = events(response)
    assert said["choices"][0]["text"] == "a"
    assert failed["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.text.endswith("data: [DONE]\n\n")


def test_a_sample_that_fails_is_told_beside_the_others() -> None:
    ended = Event(0, (7,), "a", finish_reason="length")
    wrong = Event(1, finish_reason="error", error="its logits were not finite")

    whole = ask(Played(ended, wrong), n=2)
    streamed = list(events(ask(Played(ended, wrong), n=2, stream=True)))

    assert whole.status_code == 500
    assert "its logits were not finite" in whole.text
    assert streamed[1]["choices"][0]["finish_reason"] == "length"
    assert streamed[2]["error"]["message"] == "its logits were not finite"


def test_cached_tokens_and_ids_reach_the_client() -> None:
    backend = Played(
        Event(0, prefilled=2, num_prompt_tokens=2, cached_tokens=1),
        Event(0, (7, 8), "ab", finish_reason="stop", stop_reason="x", cached_tokens=1),
    )

    answer = ask(backend, return_token_ids=True).json()

    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert answer["choices"][0]["token_ids"] == [7, 8]
    assert answer["choices"][0]["stop_reason"] == "x"
    assert backend.jobs[0].prompt_ids.tolist() == [5, 6]


def test_a_refused_prompt_among_several_cancels_the_others() -> None:
    backend = Played(0.01, ValueError("prompt must be another, got this; change it"))

    response = ask(backend, prompt=[[5], [6], [7]])

    assert response.status_code == 400
    assert len(backend.jobs) == backend.num_closed == 3


def test_a_server_says_how_far_the_engine_is() -> None:
    backend = Played(Event(0, (7,), "a", finish_reason="stop"))
    with (
        serving(backend) as live,
        httpx.Client(base_url=live.url, timeout=WAIT_S) as client,
    ):
        backend.condition = Status(is_ready=False, is_alive=False, stage="loading weights: 12%")
        ready, asked = client.get("/ready"), client.post("/v1/completions", json=ASKED)
        # an engine that comes back gets what was asked meanwhile
        backend.condition = Status(is_ready=False, stage="starting again")
        again = client.post("/v1/completions", json=ASKED)
        cleared = client.post("/cache/clear").json()

    assert (ready.status_code, ready.json()) == (503, {"status": "loading weights: 12%"})
    assert asked.status_code == 503
    assert "the engine is not ready: loading weights: 12%" in asked.text
    assert again.status_code == 200
    assert cleared == {"pages_freed": 7}


def test_an_app_may_be_mounted_in_another_one() -> None:
    with open_needle() as llm:
        inner = create_app(llm.engine)

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[None]:
            async with inner.router.lifespan_context(inner):
                yield

        outer = FastAPI(lifespan=lifespan)
        outer.mount("/model", inner)

        async def asked() -> httpx.Response:
            transport = httpx.ASGITransport(outer)
            async with (
                lifespan(outer),
                httpx.AsyncClient(transport=transport, base_url="http://x") as client,
            ):
                return await client.post("/model/v1/completions", json=ASKED, timeout=WAIT_S)

        response = asyncio.run(asked())

    assert response.status_code == 200, response.text


def test_tls_is_by_file(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = ["-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *made, *names, "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")

    async def served() -> dict[str, Any]:
        config = HttpConfig(port=0, tls_cert=str(cert), tls_key=str(key))
        server = HttpServer(Played(Event(0, (7,), "a", finish_reason="stop")), config)
        assert server.url.startswith("https://127.0.0.1:")
        running = asyncio.create_task(server.run())
        trusted = ssl.create_default_context(cafile=str(cert))
        async with httpx.AsyncClient(verify=trusted, timeout=WAIT_S) as client:
            while (await client.get(f"{server.url}/ready")).status_code != 200:
                await asyncio.sleep(0.05)
            answer = await client.post(f"{server.url}/v1/completions", json=ASKED)
        server.stop()
        assert await running == 0
        content: dict[str, Any] = answer.json()
        return content

    assert asyncio.run(served())["choices"][0]["text"] == "a"


@pytest.mark.parametrize("how", ["a request", "a signal", "a second signal"])
@pytest.mark.parametrize("is_cut", [True, False])
def test_the_exit_status_tells_of_requests_that_were_cut_off(how: str, is_cut: bool) -> None:
    script = [Event(0, (7,), "a"), 0.2, Event(0, (8,), "b", finish_reason="stop")]

    async def served() -> int:
        limit = "10ms" if how != "a second signal" and is_cut else "60s"
        server = HttpServer(Played(*script), HttpConfig(port=0, shutdown_timeout=limit))
        running = asyncio.create_task(server.run())
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            body = {**ASKED, "stream": True}
            async with client.stream("POST", "/v1/completions", json=body) as streaming:
                lines = streaming.aiter_lines()
                await anext(lines)
                ending = asyncio.create_task(end(server, client))
                async for _ in lines:
                    pass
            await ending
        return await running

    async def end(server: HttpServer, client: httpx.AsyncClient) -> None:
        if how == "a request":
            await client.post("/drain")
            return
        server.begin_drain()
        if how == "a second signal" and is_cut:
            server.stop()

    assert asyncio.run(served()) == (1 if is_cut else 0)


class Cancelling(Played):
    """A backend that ends late jobs itself, as that of a front does."""

    def __init__(self) -> None:
        super().__init__()
        self.is_late = asyncio.Event()

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        yield Event(0, (7,), "a")
        await self.is_late.wait()
        yield Event(0, finish_reason="cancelled")

    async def drain(self, timeout_s: float) -> bool:
        self.is_late.set()
        await asyncio.sleep(0.2)  # the streams have ended before the server does
        return False


def test_the_exit_status_tells_of_requests_that_the_backend_cancelled() -> None:
    async def served() -> int:
        server = HttpServer(Cancelling(), HttpConfig(port=0, shutdown_timeout="10ms"))
        running = asyncio.create_task(server.run())
        async with httpx.AsyncClient(base_url=server.url, timeout=WAIT_S) as client:
            while (await client.get("/ready")).status_code != 200:
                await asyncio.sleep(0.01)
            answer = client.post("/v1/completions", json={**ASKED, "stream": True})
            asking = asyncio.create_task(answer)
            while not server.app.state.service.gate.num_taken:
                await asyncio.sleep(0.01)
            server.begin_drain()
            assert "the server ended the request" in (await asking).text
            return await running

    assert asyncio.run(served()) == 1


def test_a_port_that_is_taken_is_said() -> None:
    with serving(Played()) as live, pytest.raises(ValueError, match="must be free to listen on"):
        HttpServer(Played(), HttpConfig(port=live.port))


def test_nobody_of_another_host_changes_a_server_without_keys() -> None:
    app = create_app(Played())

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("10.0.0.9", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/drain")

    response = asyncio.run(asked())

    assert response.status_code == 403
    assert json.loads(response.text)["error"]["message"].startswith(
        "client must be on the server's"
    )


def test_pages_of_other_hosts_may_ask_only_where_they_are_named() -> None:
    origin = {"Origin": "https://page.example"}

    def allowed(**config: object) -> str | None:
        with serving(Played(), **config) as live:
            headers = httpx.get(f"{live.url}/health", headers=origin).headers
        return headers.get("access-control-allow-origin")

    assert allowed() is None
    assert allowed(cors_origins=["https://page.example"]) == "https://page.example"
