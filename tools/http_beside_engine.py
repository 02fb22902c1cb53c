"""First tokens of short requests beside a long prompt, through HTTP and by the engine alone.

Usage: python -m tools.http_beside_engine [--length 16384] [--shorts 40] [--rounds 2]
Rounds take turns. It prints p50 and p99 of the time to the first token, and how long each took from
the start of its process until it served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np

from mnemosyne import LLM, SamplingParams
from mnemosyne.client.http import asked, checked
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.serve.async_engine import AsyncEngine
from tools.soaked import front

EVERY_S = 0.1  # between two short requests
BEFORE_S = 0.5  # that the long one has been there
OPEN = "open\n"  # what the engine alone says once it serves
CACHE = "64K"

Serve = Callable[[list[int]], Awaitable[None]]  # returns with the first token


async def beside(serve: Serve, length: int, num_shorts: int) -> list[float]:
    """Times to the first tokens of short requests, in seconds."""
    rng = np.random.default_rng(0)

    async def timed(num_tokens: int) -> float:
        ids, start_s = rng.integers(3, 60, num_tokens).tolist(), time.perf_counter()
        await serve(ids)
        return time.perf_counter() - start_s

    await timed(64)
    long = asyncio.create_task(timed(length))
    await asyncio.sleep(BEFORE_S)
    shorts = []
    for _ in range(num_shorts):
        shorts.append(asyncio.create_task(timed(64)))
        await asyncio.sleep(EVERY_S)
    found = await asyncio.gather(*shorts)
    await long
    return list(found)


def over_http(model: str, length: int, num_shorts: int) -> tuple[float, list[float]]:
    """Seconds to ``/ready``, and those to first tokens."""
    start_s = time.perf_counter()
    words = ("device=cpu", f"cache.max_tokens={CACHE}", "serve.access_log=false")
    with front(f"model={model}", *words) as server:
        while httpx.get(f"{server.url}/ready").status_code != 200:
            time.sleep(0.01)
        ready_s = time.perf_counter() - start_s

        async def serve(ids: list[int]) -> None:
            body = {"prompt": ids, "max_tokens": 4, "stream": True, "return_token_ids": True}
            async with asked(f"{server.url}/v1/completions", body) as reply:
                async for event in (await checked(reply)).events():
                    if any(choice.get("token_ids") for choice in event["choices"]):
                        return

        return ready_s, asyncio.run(beside(serve, length, num_shorts))


def alone(model: str, length: int, num_shorts: int) -> tuple[float, list[float]]:
    """The same of the engine in a process of its own, without HTTP."""
    start_s = time.perf_counter()
    words = [sys.executable, "-m", "tools.http_beside_engine", "--alone", model]
    sizes = ["--length", str(length), "--shorts", str(num_shorts)]
    with subprocess.Popen([*words, *sizes], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == OPEN
        ready_s = time.perf_counter() - start_s
        return ready_s, json.loads(process.stdout.readline())


async def serve_alone(model: str, length: int, num_shorts: int) -> None:
    """Be that process."""
    with LLM(model, device="cpu", cache={"max_tokens": CACHE}) as llm:
        async with AsyncEngine(llm.engine) as engine:
            await engine.clear_cache()  # it waits for its turn behind the measuring of steps
            print(OPEN, end="", flush=True)

            async def serve(ids: list[int]) -> None:
                async for piece in engine.submit(ids, SamplingParams(max_tokens=4)):
                    if piece.token_ids:
                        return

            print(json.dumps(await beside(serve, length, num_shorts)))


def main(words: list[str]) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--shorts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    sizes = given.length, given.shorts
    if given.alone is not None:
        asyncio.run(serve_alone(given.alone, *sizes))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_needle(Path(folder) / "needle"))
        for _ in range(given.rounds):
            for name, measure in (("engine alone", alone), ("through HTTP", over_http)):
                ready_s, ttft_s = measure(model, *sizes)
                half, most = 1000 * np.percentile(ttft_s, (50, 99))
                print(
                    f"{name}: first tokens after {half:.0f} ms, p99 {most:.0f} ms; served "
                    f"{ready_s:.2f} s after its start; load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
