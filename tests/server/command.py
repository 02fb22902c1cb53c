"""``mnemosyne serve`` as a process, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

MNEMOSYNE = (sys.executable, "-m", "mnemosyne", "serve")
NEEDLE = ("model=needle", "dtype=float64", "schedule.chunk=64", "cache.max_tokens=8K")
BODY = {"prompt": "the door code is", "max_tokens": 200, "stream": True, "ignore_eos": True}


@dataclass(slots=True, eq=False)
class Served:
    """A server that runs."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        found = re.search(r"listening at (http://\S+);", self.log)
        assert found is not None, self.log
        return found[1]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in order."""
        return children_of(self.process.pid)

    def wait_for(self, holds: Callable[[], bool], timeout_s: float = 120) -> None:
        end_s = time.monotonic() + timeout_s
        while not holds():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end_s, self.log
            time.sleep(0.05)

    def wait_ready(self) -> None:
        self.wait_for(lambda: "listening at" in self.log)
        self.wait_for(lambda: self.get("/ready").status_code == 200)

    def end(self, timeout_s: float = 90) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(timeout_s)


@contextmanager
def served(
    *words: str, program: Sequence[str] = MNEMOSYNE, model: Sequence[str] = NEEDLE
) -> Iterator[Served]:
    """Start a server on a free port; it is killed in the end, and nothing of it may be left."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*program, *model, "serve.port=0", "serve.access_log=false", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    )
    running = Served(process)
    reader = threading.Thread(target=_keep_lines, args=(running,), daemon=True)
    reader.start()
    try:
        yield running
    finally:
        started = children_of(process.pid)
        if process.poll() is None:
            process.kill()
            process.wait()
        for pid in started:  # they have sessions of their own
            with_pid_killed(pid)
        reader.join(10)
        assert process.stderr is not None
        process.stderr.close()


def _keep_lines(running: Served) -> None:
    assert running.process.stderr is not None
    for line in running.process.stderr:
        running.lines.append(line)


def with_pid_killed(pid: int) -> None:
    """Kill a process that may be gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def children_of(pid: int) -> list[int]:
    """Ranks among the children of a process, by the rank in their environment."""
    found = {}
    for name in os.listdir("/proc"):
        try:
            with open(f"/proc/{name}/stat", "rb") as stat:
                parent = int(stat.read().rpartition(b")")[2].split()[1])
            if parent != pid:
                continue
            with open(f"/proc/{name}/environ", "rb") as environ:
                words = environ.read().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
        if ranks:
            found[ranks[0]] = int(name)
    return [found[rank] for rank in sorted(found)]


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def stream_text(url: str, at: Callable[[int], None] = lambda number: None, **fields: object) -> str:
    """The text of a stream; ``at`` is called with the number of each chunk that brings some."""
    text, number = "", 0
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, **fields}, timeout=120) as got:
        assert got.status_code == 200, got.read()
        for line in got.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            added = "".join(choice["text"] for choice in chunk["choices"])
            text += added
            if added:
                number += 1
                at(number)
    return text
