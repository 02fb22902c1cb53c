"""Servers that a soak looks into: one of this process, or a front with its engine beside it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from mnemosyne import LLM
from tools.live_server import Live


class Soaked(Protocol):
    """A server, and how much of its means is in use."""

    @property
    def url(self) -> str: ...

    def processes(self) -> list[int]:
        """Process ids of server and engine."""
        ...

    def num_tasks(self) -> int:
        """Tasks on its event loop, 0 where nobody can tell."""
        ...

    def num_pages(self) -> int:
        """Pages of the cache that requests hold."""
        ...

    def num_taken(self) -> int:
        """Requests that are not at their end."""
        ...


@dataclass(slots=True)
class OwnServer:
    """A server of this process, with its engine."""

    live: Live
    llm: LLM

    @property
    def url(self) -> str:
        return self.live.url

    def processes(self) -> list[int]:
        return [os.getpid()]

    def num_tasks(self) -> int:
        return self.live.num_tasks()

    def num_pages(self) -> int:
        return self.llm.engine.scheduler.ledger.num_used

    def num_taken(self) -> int:
        return self.live.service.gate.num_taken + self.llm.engine.has_work


@dataclass(slots=True)
class Front:
    """``mnemosyne serve``, looked into through its metrics."""

    url: str
    process: int
    ranks: list[int]

    def processes(self) -> list[int]:
        return [self.process, *self.ranks]

    def num_tasks(self) -> int:
        return 0

    def num_pages(self) -> int:
        return self._gauge("cache_pages_used")

    def num_taken(self) -> int:
        return self._gauge("requests_running") + self._gauge("requests_waiting")

    def _gauge(self, name: str) -> int:
        page = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = re.search(rf"^mnemosyne_{name} (\S+)$", page, re.MULTILINE)
        assert found is not None, f"{name} is a metric"
        return int(float(found[1]))


@contextmanager
def front(*words: str) -> Iterator[Front]:
    """Serve while this lasts, on one rank.

    Args:
        words: of the command.
    """
    command = [sys.executable, "-m", "mnemosyne", "serve", "serve.port=0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = iter(process.stderr.readline, "")
            found = next(filter(None, (re.search(r" at (\S+)/v1: ", line) for line in lines)))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield Front(found[1], process.pid, ranks_of(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)


def ranks_of(process: int) -> list[int]:
    """Its children that are ranks."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    return [pid for pid, words in environments.items() if b"\0RANK=" in words]
