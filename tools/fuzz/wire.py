"""The door of the network: bodies on all routes of a server, right, odd and broken."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from mnemosyne import LLM
from mnemosyne.model_zoo.needle import write_needle
from tools.fuzz.door import Door
from tools.live_server import serving

PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")
OTHERS = (
    *("/v1/models", "/v1/models/needle", "/v1/models/x", "/health", "/ready", "/metrics"),
    *("/version", "/openapi.json", "/cache/clear", "/nowhere", "/v1/completions/"),
)
CONTROL = {"prompt": [170, 171], "max_tokens": 3, "temperature": 0, "return_token_ids": True}
MAX_TOKENS = 1024  # of the cache
RIGHT: dict[str, tuple[Any, ...]] = {
    "model": ("needle", None),
    "max_tokens": (0, 1, 3, None),
    "max_completion_tokens": (1, 2),
    "n": (1, 2, None),
    "temperature": (0, 0.7, 2, None),
    "top_p": (0.5, 1),
    "top_k": (-1, 0, 5),
    "min_p": (0, 0.1),
    "seed": (0, 7),
    "stop": (None, "door", ["a", "b"]),
    "stop_token_ids": ([], [5]),
    "logit_bias": ({}, {"5": -100}),
    "presence_penalty": (0, 1.5),
    "repetition_penalty": (1, 1.2),
    "logprobs": (None, 0, 2, True, False),
    "top_logprobs": (0, 3),
    "echo": (True, False),
    "stream": (True, False),
    "stream_options": (None, {"include_usage": True}, {"continuous_usage_stats": True}),
    "return_token_ids": (True,),
    "return_progress": (True,),
    "ignore_eos": (True, False),
    "prompt_logprobs": (0, 2),
    "priority": (0, -3),
    "deadline": ("1s", 2),
    "user": ("me",),
    "tools": ([], [{"type": "function", "function": {"name": "f"}}]),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "chat_template_kwargs": ({}, {"x": 1}),
    "nobody_knows": (1, {"a": []}),
}
PROMPTS = ("the door code is", [5, 6, 7], [[5], [6, 7]], ["door", "what is"], [0], "x")
ODD = (
    *(None, True, False, "", "a", "\n", "\udcff", "\x00", "a" * 2000, "5", "null", "NaN"),
    *(-1, 0, 1, 3, 2**31, 2**63 - 1, 2**63, 2**70, -(2**63), 0.5, -0.0, 1e308, 5e-324),
    *(float("inf"), float("nan"), [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None}),
)
CONTENTS = ("hi", "", [{"type": "text", "text": "door"}], "code " * 50)
ROLES = ("user", "system", "developer", "assistant", "tool")


class Sent(NamedTuple):
    """One request."""

    method: str
    path: str
    body: bytes


@contextmanager
def http_door() -> Iterator[Door]:
    """Requests for a server over a small model."""
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            str(write_needle(Path(folder) / "needle")),
            device="cpu",
            schedule={"chunk": 64},
            cache={"max_tokens": MAX_TOKENS, "page_size": 32},
        ) as llm,
        serving(llm.engine, access_log=False, model_names=["needle"]) as live,
        httpx.Client(base_url=live.url, timeout=20) as client,
    ):
        wire = _Wire(client)
        yield Door(name="http", draw=draw, feed=wire.feed, control=wire.control, limit_s=20.0)


def draw(rng: random.Random) -> Sent:
    """A request, mostly one that is nearly right."""
    if rng.random() < 0.05:
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "OPTIONS"])
        return Sent(method, rng.choice((*OTHERS, *PATHS)), b"")
    path = rng.choice(PATHS)
    fields = _fields(rng, path)
    body = json.dumps(fields).encode()
    return Sent("POST", path, body if rng.random() < 0.95 else _broken(rng, body))


def _fields(rng: random.Random, path: str) -> dict[str, Any]:
    made: dict[str, Any] = {"max_tokens": 2}
    for name in rng.sample(sorted(RIGHT), rng.choice([0, 0, 1, 2, 3, 5])):
        made[name] = rng.choice(RIGHT[name]) if rng.random() < 0.9 else _odd(rng)
    if path in ("/v1/completions", "/tokenize"):
        made["prompt"] = rng.choice(PROMPTS) if rng.random() < 0.9 else _odd(rng)
    if path == "/detokenize":
        made["tokens"] = rng.choice([[], [5, 6], [0]]) if rng.random() < 0.9 else _odd(rng)
    if path == "/v1/chat/completions":
        few = rng.choice([1, 1, 2, 3])
        messages = [_message(rng) for _ in range(few)]
        made["messages"] = messages if rng.random() < 0.95 else _odd(rng)
    return made


def _odd(rng: random.Random, depth: int = 0) -> Any:
    """A value of JSON, or nearly, that hardly any field may have."""
    if depth < 3 and rng.random() < 0.2:
        inner = [_odd(rng, depth + 1) for _ in range(rng.choice([1, 2, 5]))]
        return inner if rng.random() < 0.5 else {str(_odd(rng, 3))[:9]: value for value in inner}
    return [[]] * 50 if rng.random() < 0.02 else rng.choice(ODD)


def _message(rng: random.Random) -> Any:
    if rng.random() < 0.03:
        return _odd(rng)
    made = {"role": rng.choice(ROLES), "content": rng.choice(CONTENTS)}
    if rng.random() < 0.05:
        made[rng.choice(["role", "content", "tool_calls", "reasoning"])] = _odd(rng)
    return made


def _broken(rng: random.Random, body: bytes) -> bytes:
    at = rng.randrange(len(body) + 1)
    if rng.random() < 0.3:
        return body[:at]
    junk = bytes(rng.randrange(256) for _ in range(rng.choice([1, 1, 4])))
    return body[:at] + junk + body[at + rng.choice([0, 1]) :]


class _Wire:
    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._expected = self._answer()

    def feed(self, sent: Sent) -> bool:
        response = self._client.request(sent.method, sent.path, content=sent.body)
        status = response.status_code
        assert status < 500, f"status {status}: {response.text[:300]}"
        if status >= 400 and sent.method != "HEAD":
            message = response.json()["error"]["message"]
            assert " must " in message, f"no rule: {message}"
            assert ", got " in message, f"no value: {message}"
            return status in (404, 405) and sent.path not in PATHS
        if response.headers["content-type"].startswith("text/event-stream"):
            lines = [line for line in response.text.split("\n\n") if line]
            assert lines[-1] == "data: [DONE]", "the stream has no end"
            for line in lines[:-1]:
                assert "error" not in json.loads(line.removeprefix("data: ")), line
        return True

    def control(self) -> None:
        assert self._answer() == self._expected, "the control has another answer"

    def _answer(self) -> Any:
        choices = self._client.post("/v1/completions", json=CONTROL).json()["choices"]
        return choices[0]["token_ids"]
