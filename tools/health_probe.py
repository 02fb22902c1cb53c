"""Ask a server for /health until standard input ends; in a process that nothing else delays.

Usage: python -m tools.health_probe URL PID...
Prints, as JSON, for each time it asked: when, how long the answer took, and the resident bytes of
the processes.
"""

from __future__ import annotations

import http.client
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from resource import getpagesize
from urllib.parse import urlsplit

PERIOD_S = 0.1
TIMEOUT_S = 60.0

Sample = tuple[float, float, int]  # seconds on this machine's clock, seconds, bytes


@contextmanager
def probed(url: str, processes: Sequence[int]) -> Iterator[list[Sample]]:
    """Probe a server meanwhile; the samples are there at the end."""
    samples: list[Sample] = []
    command = [sys.executable, "-m", "tools.health_probe", url, *map(str, processes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as probe:
        try:
            yield samples
        finally:
            said, _ = probe.communicate()
        samples += map(tuple, json.loads(said))


def main(words: list[str]) -> int:
    """Probe, print."""
    address, processes = urlsplit(words[0]).netloc, [int(word) for word in words[1:]]
    samples: list[Sample] = []
    while not select.select([sys.stdin], [], [], PERIOD_S)[0]:
        start_s = time.monotonic()
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        connection.request("GET", "/health", headers={"Connection": "close"})
        assert connection.getresponse().read(), "it says how it is"
        connection.close()
        memory = sum(map(resident_bytes, processes))
        samples.append((start_s, time.monotonic() - start_s, memory))
    print(json.dumps(samples))
    return 0


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * getpagesize()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
