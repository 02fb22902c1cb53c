"""Seconds from a command to the first token of a short prompt, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from mnemosyne.bench.process import EngineProcess, Program

PROMPT = tuple(range(1, 33))  # token ids


def start_ours(arguments: Sequence[str], threads: int) -> float:
    """From `mnemosyne generate` to the token on its standard output, which ends the command.

    Args:
        arguments: of the command, besides the prompt.
        threads: for the computation.

    Raises:
        ValueError: if the command fails.
    """
    ids = f"token_ids=[{','.join(map(str, PROMPT))}]"
    command = [sys.executable, "-m", "mnemosyne", "generate", *arguments, ids, "max_tokens=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    started_s = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started_s
    if done.returncode != 0 or len(done.stdout.split()) != 1:
        raise ValueError(f"mnemosyne generate must give one token, got:\n{done.stderr[-2000:]}")
    return seconds


def start_peer(program: Program, settings: dict[str, Any]) -> float:
    """From the start of an engine's process to the answer with its first token."""
    request = {"ids": list(PROMPT), "max_tokens": 1, "is_filled": False, "after": 0}
    started_s = time.perf_counter()
    engine = EngineProcess(program, settings)
    try:
        (answer,) = engine.ask([request])
        seconds = time.perf_counter() - started_s
    finally:
        engine.close()
    assert len(answer["token_ids"]) == 1
    return seconds
