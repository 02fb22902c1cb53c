"""Runs of pytest by forks of one process that has torch already: seconds less for each.

Reads lines of JSON, each a run, and answers each with a line: exit status and CPU seconds. It has
imported nothing of this project, so that a fork finds what is in its own tree.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import Any

import hypothesis
import pytest
import torch

BROKEN = 70  # the exit status of a fork in which pytest did not even start
PRELOADED = (hypothesis, torch)


def _become(run: dict[str, Any]) -> int:
    """Run pytest in this process, in the folder and with the environment that are asked for."""
    os.setsid()
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(run["output"], os.O_WRONLY)
    for number, descriptor in enumerate((nothing, output, output)):
        os.dup2(descriptor, number)
    os.environ.update(run["environment"])
    os.chdir(run["folder"])
    sys.path[0] = run["folder"]
    return int(pytest.main(run["words"]))


def _wait(pid: int, deadline_s: float) -> tuple[int, resource.struct_rusage]:
    """Wait for a process, end it when its time is up, and whatever it left behind."""
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended or time.monotonic() > deadline_s:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            if not ended:
                _, status, usage = os.wait4(pid, 0)
            return os.waitstatus_to_exitcode(status), usage
        time.sleep(0.05)


def main() -> None:
    for line in sys.stdin:
        run = json.loads(line)
        pid = os.fork()
        if not pid:
            status = None
            try:
                status = _become(run)
            finally:
                if status is None:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                # at once: what the parent has still to write is the parent's
                os._exit(BROKEN if status is None else status)
        code, usage = _wait(pid, time.monotonic() + run["limit_s"])
        print(json.dumps([code, usage.ru_utime + usage.ru_stime]), flush=True)


if __name__ == "__main__":
    main()
