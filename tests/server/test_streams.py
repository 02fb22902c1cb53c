"""Streams of long prompts: signs of life, progress, and ends that clients bring about."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from mnemosyne.llm import LLM
from mnemosyne.server.progress import seconds_left
from tests.engines import WrappedExecutor
from tests.server.conftest import open_needle
from tools.live_server import Live, serving

WAIT_S = 30.0  # for what takes no time on a machine that is not busy


class Brake:
    """Holds every step for a while."""

    def __init__(self) -> None:
        self.hold_s = 0.0

    def __call__(self, plan: object) -> None:
        time.sleep(self.hold_s)


@contextmanager
def braked(**config: object) -> Iterator[tuple[Live, Brake, LLM]]:
    """A server whose steps can be held."""
    brake = Brake()
    with open_needle() as llm:
        WrappedExecutor(llm.engine, before=brake)
        with serving(llm.engine, access_log=False, **config) as live:
            yield live, brake, llm


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON of each event but the last, which ends the stream."""
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def until(is_true: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end_s, "it did not come true"
        time.sleep(0.01)


def post_raw(live: Live, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A request on a socket of ours, which nobody reads."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect(("127.0.0.1", live.port))
    made.sendall(head.encode() + data)
    return made


def test_silence_is_broken_by_chunks_that_tell_progress() -> None:
    body = {"prompt": [5] * 600, "max_tokens": 2, "stream": True, "return_progress": True}
    with braked(keep_alive=0.1) as (live, brake, _), httpx.Client(timeout=WAIT_S) as client:
        brake.hold_s = 0.25

        with client.stream("POST", f"{live.url}/v1/completions", json=body) as response:
            first, *rest = list(events(response))

        signs = [event for event in rest if not event["choices"]]
        told = [sign["prompt_progress"] for sign in signs]
        assert first["choices"][0]["text"] == ""
        assert told
        assert all(told["total"] == 600 and told["cache"] == 0 for told in told)
        done = [t["processed"] for t in told]
        assert done == sorted(done)
        assert 0 < done[-1] <= 600
        assert all(t["time_ms"] > 0 for t in told)
        assert any((t["seconds_left"] or 0) > 0 for t in told)


def test_signs_of_life_tell_nothing_that_nobody_asked_for() -> None:
    body = {"messages": [{"role": "user", "content": "door " * 200}], "stream": True}
    with braked(keep_alive=0.1) as (live, brake, _), httpx.Client(timeout=WAIT_S) as client:
        brake.hold_s = 0.4
        asked = {**body, "max_tokens": 1}

        with client.stream("POST", f"{live.url}/v1/chat/completions", json=asked) as response:
            signs = [event for event in events(response) if not event["choices"]]

    assert signs
    assert all(sign.keys() == {"id", "object", "created", "model", "choices"} for sign in signs)


def reset(made: socket.socket) -> None:
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.close()


def half_close(made: socket.socket) -> None:
    made.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("leave", [reset, half_close])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_in_mid_prefill_ends_its_work(
    leave: Callable[[socket.socket], None], stream: bool
) -> None:
    with braked() as (live, brake, llm):
        brake.hold_s = 0.1
        made = post_raw(live, {"prompt": [5] * 3000, "max_tokens": 900, "stream": stream})
        until(lambda: llm.engine.scheduler.num_running == 1)

        leave(made)

        until(lambda: not llm.engine.has_work and not llm.engine.scheduler.ledger.num_used)
        until(lambda: live.service.gate.num_taken == 0)
        made.close()


def test_a_client_that_does_not_read_is_cut_off_within_the_write_bound() -> None:
    body = {"prompt": [5], "max_tokens": 3900, "logprobs": 200, "stream": True, "ignore_eos": True}
    with braked(write_timeout=0.5) as (live, _, llm):
        made = post_raw(live, body)
        until(lambda: llm.engine.has_work)

        until(lambda: live.service.gate.num_taken == 0)

        until(lambda: not llm.engine.has_work)
        page = live.service.exposition.page().decode()
        made.close()
    assert 'mnemosyne_answers_total{end="stalled"} 1.0' in page


def test_a_client_that_reads_late_gets_all_of_it_in_small_events(live: Live) -> None:
    body = {"prompt": [5, 9], "max_tokens": 700, "logprobs": 200, "ignore_eos": True}
    whole = httpx.post(f"{live.url}/v1/completions", json=body, timeout=WAIT_S).json()
    expected = whole["choices"][0]
    made = post_raw(live, {**body, "stream": True})
    until(lambda: live.service.backend.status().num_running == 1)
    until(lambda: live.service.backend.status().num_running == 0)

    with made, made.makefile("rb") as lines:
        data = [line for line in lines if line.startswith(b"data: {")]

    told = [json.loads(line.removeprefix(b"data: "))["choices"][0] for line in data]
    assert max(map(len, data)) < 256 << 10
    assert "".join(choice["text"] for choice in told) == expected["text"]
    for name, values in expected["logprobs"].items():
        if name != "text_offset":
            said = [value for choice in told[1:] for value in choice["logprobs"][name]]
            assert said == values
    assert told[-1]["finish_reason"] == "length"


def test_time_that_is_left_follows_the_prediction_and_what_was_spent() -> None:
    curve = ((1000, 1.0), (2000, 3.0), (4000, 9.0))

    assert seconds_left(curve, 0.0, 0, 0, 4000) == 9.0
    assert seconds_left(curve, 2.0, 1000, 1000, 4000) == pytest.approx(16.0)
    assert seconds_left(curve, 4.0, 1000, 2000, 4000) == pytest.approx(12.0)
    assert seconds_left((), 1.0, 10, 10, 30) == pytest.approx(2.0)
    assert seconds_left((), 1.0, 0, 0, 30) is None
    assert seconds_left(curve, 1.0, 30, 30, 30) == 0.0
