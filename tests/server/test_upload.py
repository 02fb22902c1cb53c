"""Prompts that are uploaded in pieces, through a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from mnemosyne.server.backend import About, Event, Job
from mnemosyne.server.upload import LINE_BYTES, Upload
from tests.server.conftest import open_needle
from tests.server.test_streams import WAIT_S, half_close, reset, until
from tools.live_server import Live, serving

PROMPT = [5 + 7 * i % 40 for i in range(1500)]
ASKED = {"max_tokens": 8, "temperature": 1.0, "seed": 3, "n": 2, "logprobs": 1}
JSONL = {"content-type": "application/jsonl"}
STALL_S = 0.5


@pytest.fixture(scope="module")
def slow() -> Iterator[tuple[Live, LLM]]:
    """A server that waits for half a second for what is to come."""
    with open_needle() as llm, serving(llm.engine, write_timeout=STALL_S) as live:
        yield live, llm


def lines(*contents: object) -> bytes:
    return b"".join(json.dumps(content).encode() + b"\n" for content in contents)


def upload(live: Live, *contents: Any) -> httpx.Response:
    body = (content if isinstance(content, bytes) else lines(content) for content in contents)
    return httpx.post(f"{live.url}/v1/completions", content=body, headers=JSONL, timeout=WAIT_S)


def begin(live: Live, *contents: object) -> socket.socket:
    """The beginning of an upload whose end does not come."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/jsonl\r\n"
    made = socket.create_connection(("127.0.0.1", live.port))
    data = lines(*contents)
    made.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(data):x}\r\n".encode() + data)
    made.sendall(b"\r\n")
    return made


@pytest.mark.parametrize("asked", [ASKED, {"max_tokens": 5, "prompt_logprobs": 1}])
def test_the_answer_is_that_of_the_whole_prompt(live: Live, asked: dict[str, Any]) -> None:
    whole = httpx.post(
        f"{live.url}/v1/completions", json={"prompt": PROMPT, **asked}, timeout=WAIT_S
    ).json()

    pieces = upload(live, asked, PROMPT[:700], [], b"\n", PROMPT[700:701], PROMPT[701:]).json()

    for one, other in zip(pieces["choices"], whole["choices"], strict=True):
        assert one["text"] == other["text"]
        assert one["finish_reason"] == other["finish_reason"]
    assert pieces["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_prefill_begins_before_the_upload_ends_and_is_not_repeated(live: Live) -> None:
    prompt = PROMPT[::-1]
    options = {"include_usage": True}
    opening = {"max_tokens": 1, "stream": True, "stream_options": options, "cache_salt": "begins"}
    before = num_prefilled(live)

    def body() -> Iterator[bytes]:
        yield lines(opening, prompt[:1000])
        until(lambda: num_prefilled(live) >= before + 1000)
        yield lines(prompt[1000:])

    said = httpx.post(
        f"{live.url}/v1/completions", content=body(), headers=JSONL, timeout=WAIT_S
    ).text

    usage = json.loads(said.split("data: ")[-2])["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 1000 - 32


def num_prefilled(live: Live) -> float:
    return live.service.backend.status().counters["prefilled_tokens"]


@pytest.mark.parametrize("leave", [reset, half_close, socket.socket.close])
def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    slow: tuple[Live, LLM], leave: Callable[[socket.socket], None]
) -> None:
    live, llm = slow
    made = begin(live, {"max_tokens": 9}, PROMPT)
    until(lambda: live.service.gate.num_taken == 1)

    leave(made)

    until(lambda: live.service.gate.num_taken == 0)
    until(lambda: not llm.engine.has_work and not llm.engine.scheduler.ledger.num_used)
    made.close()


def test_an_upload_that_stalls_ends_alone(slow: tuple[Live, LLM]) -> None:
    live, llm = slow
    stalled = begin(live, {"max_tokens": 9}, PROMPT)
    body = {"prompt": PROMPT[:9], "max_tokens": 400, "ignore_eos": True}
    expected = llm_text(live, body)

    said = stalled.recv(1 << 16).decode()

    assert "408 Request Timeout" in said
    assert "body must come without a pause of 0.5 s" in said
    assert llm_text(live, body) == expected
    until(lambda: not llm.engine.has_work and not live.service.gate.num_taken)
    stalled.close()


def llm_text(live: Live, body: dict[str, Any]) -> str:
    made = httpx.post(f"{live.url}/v1/completions", json=body, timeout=WAIT_S).json()
    return str(made["choices"][0]["text"])


@pytest.mark.parametrize(
    ("contents", "status", "said"),
    [
        ([], 400, "body must hold JSON lines, got none"),
        ([{"max_tokens": 1}], 400, "prompt must hold at least one token, got none"),
        ([[5, 6]], 400, "body must be a JSON object"),
        ([{"prompt": "x"}, [5]], 400, "prompt must be left out where the prompt comes in lines"),
        ([{"echo": True}, [5]], 400, "echo must be left out where the prompt comes in lines"),
        ([{"n": 0}, [5]], 400, "n must lie in"),
        ([{}, [5], 6], 400, "in line 3"),
        ([{}, [5], ["x"]], 400, "must be lists of token ids in [0, "),
        ([{}, [5], [10**6]], 400, "got 1000000 in line 3"),
        ([{}, [5], [[6]]], 400, "in line 3; write lines such as [1, 2, 3]"),
        ([{"max_tokens": 96}, PROMPT, PROMPT, PROMPT], 400, "at most 4000 tokens, got 4500"),
        ([{}, [5], b"[" + b" " * LINE_BYTES], 413, "a line must hold at most 131,072 bytes"),
    ],
)
def test_what_is_wrong_is_named(live: Live, contents: list[Any], status: int, said: str) -> None:
    response = upload(live, *contents)

    assert response.status_code == status, response.text
    assert said in response.json()["error"]["message"]
    until(lambda: live.service.gate.num_taken == 0)


def test_an_upload_is_as_long_as_its_parameters_leave_room(offline: LLM, live: Live) -> None:
    expected = offline.generate(PROMPT, SamplingParams(max_tokens=3))[0]

    made = upload(live, {"max_tokens": 3}, *([token] for token in PROMPT)).json()

    assert made["choices"][0]["text"] == expected.text


def test_tokens_of_an_upload_count_once_and_even_if_its_end_never_comes(
    slow: tuple[Live, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    live, taken = slow[0], list[int]()
    monkeypatch.setattr(live.service.gate.keys, "take_tokens", lambda _, count: taken.append(count))

    upload(live, {"max_tokens": 2, "ignore_eos": True}, PROMPT[:1000], PROMPT[1000:])
    whole, taken[:] = sum(taken), []
    left = begin(live, {"max_tokens": 2}, PROMPT)
    until(lambda: sum(taken) == len(PROMPT))
    left.close()
    until(lambda: live.service.gate.num_taken == 0)

    assert whole == len(PROMPT) + 2
    assert sum(taken) == len(PROMPT)


class Ending:
    """A backend that ends every job with an event."""

    def __init__(self, event: Event) -> None:
        self.event, self.num_jobs = event, 0

    async def submit(self, job: Job) -> AsyncIterator[Event]:
        self.num_jobs += 1
        yield self.event


ABOUT = About(
    model="x",
    version="0",
    vocab_size=64,
    max_model_len=1 << 20,
    max_request_tokens=1 << 20,
    num_pages=1,
    page_size=16,
    keeps_prefixes=True,
)


def upload_of(*parts: bytes, count: Callable[[int], None] = lambda num_ids: None) -> Upload:
    """An upload of parts that are there, without an end."""
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else await asyncio.Event().wait()

    return Upload(receive, 1 << 30, WAIT_S, count)


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (Event(0, finish_reason="error", error="it ended the engine twice"), "engine twice"),
        (Event(0, finish_reason="cancelled"), "the server ended the request"),
    ],
)
def test_an_upload_whose_beginning_the_engine_ends_is_over(event: Event, said: str) -> None:
    backend = Ending(event)

    async def main() -> None:
        made = upload_of(lines({}, PROMPT))
        await made.opening()
        with pytest.raises(RuntimeError, match=said):
            await asyncio.wait_for(made.prompt(backend, ABOUT, SamplingParams(), "x"), WAIT_S)

    asyncio.run(main())

    assert backend.num_jobs == 1


def test_a_part_of_many_short_lines_lets_others_go_on_in_between() -> None:
    num_lines, turns, seen = 20_000, 0, list[int]()

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def main() -> None:
        made = upload_of(lines({}) + b"[5]\n" * num_lines, count=lambda _: seen.append(turns))
        await made.opening()
        running = [
            asyncio.ensure_future(each)
            for each in (made.prompt(Ending(Event(0)), ABOUT, SamplingParams(), "x"), others())
        ]
        while len(seen) < num_lines:
            await asyncio.sleep(0)
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(main())

    assert max(seen.count(turn) for turn in set(seen)) <= LINE_BYTES // 64
