"""Run the fuzzer on doors, print figures and faults; exit 1 if there are any.

Usage: python -m tools.fuzz [--doors params ...] [--number 20000] [--seed 0]
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tools.fuzz.command_line import command_line_door
from tools.fuzz.door import Door, fuzz
from tools.fuzz.files import files_door
from tools.fuzz.params import params_door
from tools.fuzz.wire import http_door

DOORS: dict[str, Callable[[], AbstractContextManager[Door]]] = {
    "files": files_door,
    "command_line": command_line_door,
    "params": params_door,
    "http": http_door,
}
MIN_ACCEPTED = 0.3
MAX_GROWTH_BYTES = 200 * 2**20


def main(words: list[str]) -> int:
    """Fuzz the doors that were asked for; the number of those with a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    logging.disable(logging.CRITICAL)
    num_wrong = 0
    for name in arguments.doors:
        start_s = time.perf_counter()
        with DOORS[name]() as door:
            report = fuzz(door, arguments.number, arguments.seed)
        print(f"{report}, {time.perf_counter() - start_s:.0f} s")
        print(*report.faults, sep="\n")
        is_right = report.accepted >= MIN_ACCEPTED and report.growth_bytes <= MAX_GROWTH_BYTES
        num_wrong += bool(report.faults) or not is_right
    return num_wrong


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
