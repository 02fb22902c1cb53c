"""Soak a server, which must stay what it was: streaming clients that behave and misbehave.

Clients read to the end, reset, close, half-close, stop reading for a while or for good, leave in
the middle of a long prompt, or send what is refused. What is left of pages, requests, descriptors,
tasks and memory afterwards, wrong answers, and how long /health took meanwhile. Exit 1 if a bound
is passed.

Usage: python -m tools.soak_http [--front] [--seconds 300] [--clients 200] [--seed 0]
With ``--front`` the server is `mnemosyne serve`, whose engine is a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mnemosyne import LLM, SamplingParams
from mnemosyne.client.http import NoAnswerError, asked, checked
from mnemosyne.model_zoo.needle import write_needle
from tools.health_probe import Sample, probed
from tools.live_server import serving
from tools.soaked import OwnServer, Soaked, front

PROMPTS = [[5 + i, 6, 7 + i] * (1 + 3 * i) for i in range(8)]
LONG = [5, 6, 7] * 1000
NUM_TOKENS = 40
WRITE_S = 3.0  # that the server leaves a client that does not read
SETTLE_S = 30.0  # for what was cancelled to be gone
HEALTH_S = 0.05  # of /health at p99
MAX_GROWTH_BYTES = 64 * 2**20


@dataclass(slots=True)
class Found:
    """Remains of a run."""

    seconds: float
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    num_pages: int = 0
    num_taken: int = 0
    num_files: int = 0  # more than before
    num_tasks: int = 0  # more than before
    growth_bytes: int = 0  # after the first quarter
    slope_bytes: float = 0.0  # of memory, by second, after the first quarter

    def faults(self) -> list[str]:
        """Bounds that are passed; those of time and memory apart, which a busy machine passes."""
        left = {
            "pages": self.num_pages,
            "requests": self.num_taken,
            "descriptors": self.num_files,
            "tasks": self.num_tasks,
        }
        return self.wrong[:5] + [
            f"{count} {name} are left" for name, count in left.items() if count
        ]

    def loads(self) -> list[str]:
        """Bounds of time and memory that are passed."""
        found = []
        if self.growth_bytes > MAX_GROWTH_BYTES:
            found.append(f"memory grew by {self.growth_bytes >> 20} MiB")
        if self.p99_health_s > HEALTH_S:
            found.append(f"/health took {1000 * self.p99_health_s:.0f} ms at p99")
        return found

    @property
    def p99_health_s(self) -> float:
        return float(np.percentile(self.health_s, 99)) if self.health_s else 0.0


class Client:
    """One client that asks again and again, each time in another manner.

    Args:
        url: of the server.
        rng: of its own.
        expected: texts of the prompts.
        found: where ends are noted.
    """

    def __init__(self, url: str, rng: random.Random, expected: list[str], found: Found) -> None:
        self._url, self._rng, self._expected, self._found = url, rng, expected, found
        self._manners: dict[str, Callable[[], Awaitable[None]]] = {
            "read": self._read,
            "reset": self._reset,
            "close": self._close,
            "half-close": self._half_close,
            "pause": self._pause,
            "stall": self._stall,
            "leave a long prompt": self._leave_long,
            "refused": self._refused,
        }
        self._weights = [8, 2, 2, 2, 2, 0.3, 1, 1]

    async def once(self) -> None:
        """Ask once."""
        (manner,) = self._rng.choices(list(self._manners), self._weights)
        try:
            await self._manners[manner]()
        except (OSError, NoAnswerError, asyncio.IncompleteReadError) as error:
            self._found.wrong.append(f"{manner}: {type(error).__name__}: {error}")
        self._found.ends[manner] += 1

    async def _read(self) -> None:
        index = self._rng.randrange(len(PROMPTS))
        async with asked(f"{self._url}/v1/completions", body_of(index)) as reply:
            events = [event async for event in (await checked(reply)).events()]
        self._compare(index, events)

    def _compare(self, index: int, events: list[dict[str, Any]]) -> None:
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        if text != self._expected[index]:
            self._found.wrong.append(f"prompt {index} has another answer: {text!r}")

    async def _reset(self) -> None:
        _, writer = await self._begun()
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def _close(self) -> None:
        _, writer = await self._begun()
        writer.close()

    async def _half_close(self) -> None:
        reader, writer = await self._begun()
        writer.write_eof()
        await reader.read()  # the server closes its side
        writer.close()

    async def _pause(self) -> None:
        index = self._rng.randrange(len(PROMPTS))
        async with asked(f"{self._url}/v1/completions", body_of(index)) as reply:
            await asyncio.sleep(self._rng.random())
            events = [event async for event in (await checked(reply)).events()]
        self._compare(index, events)

    async def _stall(self) -> None:
        body = {"prompt": [5], "max_tokens": 1500, "ignore_eos": True, "logprobs": 100}
        reader, writer = await self._sent({**body, "stream": True})
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(2 * WRITE_S)
        writer.transport.abort()
        del reader

    async def _leave_long(self) -> None:
        _, writer = await self._sent({"prompt": LONG, "max_tokens": 500, "stream": True})
        await asyncio.sleep(self._rng.random() / 5)
        writer.transport.abort()

    async def _refused(self) -> None:
        body = {"prompt": [5] * 20_000, "max_tokens": 1, "stream": True}
        async with asked(f"{self._url}/v1/completions", body) as reply:
            if reply.status != 400:
                self._found.wrong.append(f"status {reply.status} for what never fits")
            await reply.text()

    async def _begun(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream of which something was read."""
        reader, writer = await self._sent(body_of(self._rng.randrange(len(PROMPTS))))
        for _ in range(self._rng.randrange(12)):
            await reader.readline()
        return reader, writer

    async def _sent(
        self, body: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = urlsplit(self._url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        await writer.drain()
        return reader, writer


def body_of(index: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[index], "stream": True, **sampling(index)}


def sampling(index: int) -> dict[str, Any]:
    return {"max_tokens": NUM_TOKENS, "temperature": index / 4, "seed": index, "ignore_eos": True}


async def soak(
    server: Soaked, expected: list[str], *, seconds: float, clients: int, seed: int
) -> Found:
    """Let clients come and go for a while; what is left once they are gone."""
    found = Found(seconds)
    rng = random.Random(seed)
    made = [
        Client(server.url, random.Random(rng.random()), expected, found) for _ in range(clients)
    ]
    await made[0]._read()
    files, tasks, end_s = num_files(server), server.num_tasks(), time.monotonic() + seconds

    async def behave(client: Client) -> None:
        while time.monotonic() < end_s:
            await client.once()

    with probed(server.url, server.processes()) as samples:
        await asyncio.gather(*(behave(client) for client in made))
    settled_s = time.monotonic() + SETTLE_S
    while time.monotonic() < settled_s and server.num_taken():
        await asyncio.sleep(0.05)
    await asyncio.sleep(1)  # for the kernel and the loops to close and tell what was left
    found.num_pages, found.num_taken = server.num_pages(), server.num_taken()
    found.num_files = max(0, num_files(server) - files)
    found.num_tasks = max(0, server.num_tasks() - tasks)
    _note(samples, found)
    return found


def _note(samples: list[Sample], found: Found) -> None:
    found.health_s = [health_s for _, health_s, _ in samples]
    late = samples[len(samples) // 4 :]
    if len(late) > 2:
        times, _, sizes = np.array(late).T
        found.slope_bytes = float(np.polyfit(times - times[0], sizes, 1)[0])
        found.growth_bytes = int(sizes[-1] - sizes[0])


def expect(llm: LLM) -> list[str]:
    """Texts of the prompts, offline."""
    params = [SamplingParams(**sampling(index)) for index in range(len(PROMPTS))]
    return [output.text for output in llm.generate(PROMPTS, params)]


def num_files(server: Soaked) -> int:
    """Descriptors that its processes hold."""
    return sum(len(os.listdir(f"/proc/{process}/fd")) for process in server.processes())


@contextmanager
def soaked(model: str, *, is_front: bool) -> Iterator[tuple[Soaked, list[str]]]:
    """A server over a model, and the texts of the prompts."""
    options: dict[str, Any] = {"schedule": {"chunk": 64}, "cache": {"max_tokens": "16K"}}
    with LLM(model, dtype="float64", device="cpu", **options) as llm:
        expected = expect(llm)
        if not is_front:
            with serving(llm.engine, access_log=False, write_timeout=WRITE_S) as live:
                yield OwnServer(live, llm), expected
            return
    with front(
        f"model={model}",
        "dtype=float64",
        "device=cpu",
        "schedule.chunk=64",
        "cache.max_tokens=16K",
        "serve.access_log=false",
        f"serve.write_timeout={WRITE_S}",
    ) as server:
        yield server, expected


def main(words: list[str]) -> int:
    """Soak, print, and tell whether a bound was passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--front", action="store_true")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_needle(Path(folder) / "needle"))
        with soaked(model, is_front=given.front) as (server, expected):
            sizes = {"seconds": given.seconds, "clients": given.clients, "seed": given.seed}
            found = asyncio.run(soak(server, expected, **sizes))
    print(f"{sum(found.ends.values()):,} requests: {dict(found.ends)}")
    print(
        f"/health: p99 {1000 * found.p99_health_s:.1f} ms of {len(found.health_s)}; memory "
        f"{found.slope_bytes / 1024:+.1f} KiB/s, {found.growth_bytes / 2**20:+.1f} MiB in all"
    )
    faults = [*found.faults(), *found.loads()]
    print("\n".join(faults) or "nothing is left behind")
    return min(1, len(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
