"""Measure what a delivered token costs the front: CPU seconds of its process, by stream and step.

Usage: python -m tools.front_cost [--streams 64] [--tokens 300] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from mnemosyne.model_zoo.needle import write_needle
from tools.soaked import Front, front


async def delivered(url: str, number: int, num_tokens: int) -> tuple[int, int]:
    """Read one stream to its end; its tokens, and the events that brought them."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    body = {
        "prompt": [5 + number % 8, 6, 7],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    num_events, end = 0, b""
    while part := await reader.read(1 << 16):
        num_events += part.count(b"data: {")
        end = end[-1000:] + part
    writer.close()
    found = re.search(rb'"completion_tokens":(\d+)', end)
    assert found is not None, end
    return int(found[1]), num_events


async def measure(server: Front, num_streams: int, num_tokens: int) -> None:
    """Print the cost of one round."""
    start_s, before_s = time.monotonic(), cpu_s(server.process)
    streams = [delivered(server.url, number, num_tokens) for number in range(num_streams)]
    tokens, events = map(sum, zip(*await asyncio.gather(*streams), strict=True))
    spent_s, seconds = cpu_s(server.process) - before_s, time.monotonic() - start_s
    print(
        f"{tokens:,} tokens in {events:,} events, {seconds:.1f} s: {1e6 * spent_s / tokens:.1f} us "
        f"of CPU per token, {1e6 * spent_s / events:.1f} per event; load {os.getloadavg()[0]:.1f}"
    )


def cpu_s(process: int) -> float:
    """CPU seconds of a process, those of its children left out."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def main(words: list[str]) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        model = str(write_needle(Path(folder) / "needle"))
        options = ("device=cpu", "cache.max_tokens=64K", "serve.access_log=false")
        with front(f"model={model}", *options) as server:
            for _ in range(given.rounds):
                asyncio.run(measure(server, given.streams, given.tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
