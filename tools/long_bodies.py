"""Time the clients that are served beside long bodies: ten million ids, 100 MB of text.

Usage: python -m tools.long_bodies [--megabytes 100] [--model smollm2]
Prints, as JSON, how long each took, the slowest /health meanwhile, the times between tokens of
running decodes, and how much memory the server's processes grew by.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

POLL_S = 0.02
WAIT_S = 900.0
NUM_WARM = 200  # gaps that are left out
QUIET_S = 10.0  # in which decodes run alone


def main(words: list[str]) -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--decodes", type=int, default=8)
    arguments = parser.parse_args(words)
    ids = json.dumps({"prompt": [5] * 10_000_000, "max_tokens": 1}, separators=(",", ":")).encode()
    text = "The door code is seven, said the keeper, and went on. " * (arguments.megabytes * 18_868)
    chat = json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode()
    del text
    with started(arguments.model) as (url, process), running(url, arguments.decodes) as gaps:
        while len(gaps) < NUM_WARM:  # step times are measured before the first token
            time.sleep(POLL_S)
        gaps.clear()
        time.sleep(QUIET_S)
        quiet = percentile(gaps)
        for name, path, body in (
            ("ten million ids", "/v1/completions", ids),
            ("a long text", "/v1/chat/completions", chat),
        ):
            gaps.clear()
            found = measured(url, process, lambda p=path, b=body: post(url + p, b))
            found["p99_tbt_ms"], found["p99_tbt_quiet_ms"] = percentile(gaps), quiet
            print(name, json.dumps(found))
    return 0


@contextmanager
def started(model: str) -> Iterator[tuple[str, int]]:
    """A server of its own; its URL and process."""
    words = [f"model={model}", "serve.port=0", "schedule.target_tbt=200ms", "cache.max_tokens=32K"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mnemosyne", "serve", *words, "serve.access_log=false"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    url = ""
    for line in server.stderr:
        if "/v1: " in line:
            url = line.partition(" at ")[2].partition("/v1")[0]
            break
    threading.Thread(target=server.stderr.read, daemon=True).start()
    try:
        yield url, server.pid
    finally:
        server.terminate()
        server.wait()


@contextmanager
def running(url: str, num_decodes: int) -> Iterator[list[float]]:
    """Decodes that go on; the gaps between their tokens, in seconds, as they come."""
    gaps: list[float] = []
    is_over = threading.Event()

    def decode() -> None:
        body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True}
        while not is_over.is_set():
            with httpx.stream(
                "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=WAIT_S
            ) as response:
                last_s = 0.0
                for line in response.iter_lines():
                    now_s = time.perf_counter()
                    if line and last_s:
                        gaps.append(now_s - last_s)
                    last_s = now_s if line else last_s
                    if is_over.is_set():
                        break

    threads = [threading.Thread(target=decode, daemon=True) for _ in range(num_decodes)]
    for thread in threads:
        thread.start()
    try:
        yield gaps
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def measured(url: str, process: int, act: Callable[[], Any]) -> dict[str, Any]:
    """Do something while /health is asked and memory is watched."""
    health: list[float] = []
    memory = [resident_bytes(process)]
    is_over = threading.Event()

    def watch() -> None:
        with httpx.Client(timeout=WAIT_S) as client:
            while not is_over.is_set():
                start_s = time.perf_counter()
                client.get(f"{url}/health")
                health.append(time.perf_counter() - start_s)
                memory.append(resident_bytes(process))
                time.sleep(POLL_S)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start_s = time.perf_counter()
    said = act()
    seconds = time.perf_counter() - start_s
    is_over.set()
    thread.join()
    return {
        "answer": said,
        "seconds": round(seconds, 2),
        "health_p99_ms": percentile(health),
        "health_most_ms": round(1000 * max(health), 1),
        "growth_mb": round((max(memory) - memory[0]) / 1e6),
    }


def post(url: str, body: bytes) -> str:
    response = httpx.post(url, content=body, timeout=WAIT_S)
    return f"{response.status_code} {response.text[:160]}"


def percentile(seconds: list[float]) -> float:
    """p99 in milliseconds."""
    return round(1000 * float(np.percentile(seconds, 99)), 1) if seconds else 0.0


def resident_bytes(process: int) -> int:
    """Of a process and all under it."""
    total, todo = 0, [process]
    while todo:
        pid = todo.pop()
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except OSError:
            continue
        total += sum(
            int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")
        )
        todo += map(int, children.split())
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
