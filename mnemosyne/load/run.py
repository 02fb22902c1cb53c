"""Sends the requests of a run, each at its moment, and times what comes back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from mnemosyne.client.http import NoAnswerError, asked, checked
from mnemosyne.config_client import BenchServeConfig, read_key
from mnemosyne.load.requests import Outcome, Planned


async def run(
    config: BenchServeConfig,
    requests: Sequence[Planned],
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Send all, wait for all.

    Args:
        config: the server.
        requests: what is sent when.
        on_end: called with each as it ends.

    Returns:
        One outcome per request, in order: none is dropped.

    Raises:
        ValueError: if the server does not say which model it has, and none is named.
    """
    key = read_key(config.api_key)
    model = config.model or await first_model(config.url, key)
    places: Any = nullcontext()
    if config.concurrency is not None:
        places = asyncio.Semaphore(config.concurrency)
    started_s = time.perf_counter()

    async def serve(request: Planned) -> Outcome:
        outcome = Outcome(request.index, len(request.prompt), request.is_long)
        await asyncio.sleep(max(0.0, request.start_s - (time.perf_counter() - started_s)))
        async with places:
            outcome.start_s = time.perf_counter() - started_s
            await _serve(config, request, outcome, body_of(config, request, model), key)
        on_end(outcome)
        return outcome

    return list(await asyncio.gather(*(serve(request) for request in requests)))


async def first_model(url: str, key: str | None) -> str:
    """The first model that a server lists.

    Raises:
        ValueError: if it lists none.
    """
    try:
        async with asked(f"{url}/v1/models", key=key) as reply:
            text = await (await checked(reply)).text()
        return str(json.loads(text)["data"][0]["id"])
    except (NoAnswerError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"url must be that of an OpenAI-compatible server, got {url!r} ({error}); start it, "
            "or name its model"
        ) from error


def body_of(config: BenchServeConfig, request: Planned, model: str) -> dict[str, Any]:
    made = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": config.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return made | ({"ignore_eos": True} if config.ignore_eos else {})


async def _serve(
    config: BenchServeConfig,
    request: Planned,
    outcome: Outcome,
    body: dict[str, Any],
    key: str | None,
) -> None:
    start_s = time.perf_counter()
    try:
        async with (
            asyncio.timeout(float(config.timeout)),
            asked(f"{config.url}/v1/completions", body, key=key) as reply,
        ):
            await _read((await checked(reply)).events(), outcome, start_s)
    except NoAnswerError as error:
        outcome.error, outcome.status = str(error), error.status
    except TimeoutError:
        outcome.error = f"no end within {config.timeout:g} s"
    outcome.seconds = time.perf_counter() - start_s


async def _read(events: Any, outcome: Outcome, start_s: float) -> None:
    """Time the tokens of a stream; chunks without choices bring none."""
    last_s, num_chunks = start_s, 0
    async for event in events:
        now_s = time.perf_counter()
        if event.get("usage"):
            outcome.num_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", []):
            if not choice.get("text") and choice.get("finish_reason") is None:
                continue
            num_chunks += 1
            if outcome.ttft_s is None:
                outcome.ttft_s = now_s - start_s
            else:
                outcome.tbt_s.append(now_s - last_s)
            last_s = now_s
    outcome.num_tokens = outcome.num_tokens or num_chunks
