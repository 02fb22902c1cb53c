"""The process that renders chat templates: started on first use, bounded, ended with its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any

PROGRAM = Path(__file__).with_name("template_worker.py")
PROCESSOR_S = 5  # of one rendering, and for each
BYTES_PER_S = 8 << 20  # of messages another one
MEMORY_BYTES = 256 << 20  # beside 64 times the messages
MAX_CHARS = 4 << 20  # of text, beside 16 times the messages
STOP_S = 2.0  # that the process may take to end once its input is closed


class RenderError(ValueError):
    """A template that gave no text; the message says what was got."""


class Renderer:
    """Renders the templates of one checkpoint, from any thread.

    A template is a program that came with the weights. It runs in a process of its own, where
    processor time and memory have limits that nothing it does can pass; a process that met one
    is replaced at the next rendering.

    Args:
        sources: Jinja templates by name.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._owner = 0  # process that the rest belongs to: a fork starts its own
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._close: Callable[[], object] = lambda: None

    def render(self, name: str, request: str) -> str:
        """The text that a template makes.

        Args:
            name: of the template.
            request: the names that it may read, a JSON object.

        Raises:
            RenderError: if there is none.
        """
        if self._owner != os.getpid():
            self._owner, self._lock, self._process = os.getpid(), Lock(), None
            self._close = lambda: None
        limits = {
            "processor_s": PROCESSOR_S + len(request) // BYTES_PER_S,
            "memory_bytes": MEMORY_BYTES + 64 * len(request),
            "max_chars": MAX_CHARS + 16 * len(request),
        }
        line = f"{json.dumps(limits)}\t[{json.dumps(name)}, {request}]\n".encode()
        with self._lock:
            answer = self._ask(line)
        if not answer:
            raise RenderError(self._why(limits))
        said: dict[str, Any] = json.loads(answer)
        if "text" not in said:
            raise RenderError(said["error"])
        return str(said["text"])

    def _ask(self, line: bytes) -> bytes:
        """The answer; nothing if the process ended over it."""
        if self._process is None or self._process.poll() is not None:
            self._close()  # the remains of a process that has ended
            self._process = self._start()
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(line)
            stdin.flush()
            return stdout.readline()
        except BrokenPipeError:
            return b""

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # Ctrl-C is for its owner
            )
        except OSError as error:
            raise RenderError(f"no process to render it in ({error.strerror})") from error
        self._close = weakref.finalize(self, _end, process, os.getpid())
        assert process.stdin is not None
        process.stdin.write(json.dumps(self._sources).encode() + b"\n")
        return process

    def _why(self, limits: Mapping[str, int]) -> str:
        assert self._process is not None
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return f"more than {limits['processor_s']} s of processor time"
        return f"the end of its process with status {status}"


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a fork must not end the processes of its parent
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.close()
        process.wait(STOP_S)
    except (BrokenPipeError, subprocess.TimeoutExpired):
        process.kill()
        process.wait()
    process.stdout.close()
