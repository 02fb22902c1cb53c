"""An engine in a process of its own, in the interpreter that has it, spoken to in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).parent / "peers"
STOP_S = 10.0  # that an engine may take to end once its input is closed
SHOWN_LINES = 8  # of what an engine that failed last said


@dataclass(frozen=True, slots=True)
class Program:
    """The place of an engine: its program and its interpreter."""

    name: str  # as the tables call it
    file: str  # in the folder of peers
    python: str  # the interpreter that has the engine


class EngineProcess:
    """One engine, open until ``close``.

    Args:
        program: what to start.
        settings: its first line; see ``peers/main.py``.

    Raises:
        ValueError: if it does not start; with what it said last.
    """

    def __init__(self, program: Program, settings: dict[str, Any]) -> None:
        self.name = program.name
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        command = [program.python, str(PROGRAMS / "main.py"), str(PROGRAMS / program.file)]
        threads = str(settings["threads"])
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
            )
        except OSError as error:
            self._said.close()
            raise ValueError(
                f"{program.name}_python must be an interpreter that starts, got "
                f"{program.python!r} ({error.strerror}); name one like /path/to/venv/bin/python"
            ) from error
        try:
            self.about = self.ask(settings)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Any) -> Any:
        """Send one line, wait for the answer.

        Raises:
            ValueError: if the engine ends instead.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        line = ""
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            pass  # it has ended; the reason is looked up below
        if not line:
            raise ValueError(
                f"{self.name} must answer, got its end with status {self._process.wait()}; "
                f"it last said:\n{self._last_words()}"
            )
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(STOP_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line.rstrip() for line in self._said if line.strip()]
        return "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:])
