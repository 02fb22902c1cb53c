"""Measure the peaks of this machine: copy and read of memory, matrix products by dtype.

The limits in docs/performance.md are bytes and operations over these numbers.

Usage: python tools/peaks.py [--threads N] [--megabytes 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import time
from collections.abc import Callable

import torch

REPEATS = 7  # the best counts: a peak is what nothing disturbed
SHAPES = ((4096, 4096, 4096), (2048, 1024, 2816))  # rows, inner size, columns
DTYPES = (torch.float32, torch.bfloat16)


def best_s(function: Callable[[], object]) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    function()
    seconds = []
    for _ in range(REPEATS):
        started_s = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def memory(num_bytes: int) -> dict[str, float]:
    """GB/s: a copy counts the bytes read and those written, a read is a sum in float32."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32)
    target = torch.empty_like(source)
    # as the pool of the cache is kept: one lookup of an address serves 2 MB
    buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    huge = torch.frombuffer(buffer, dtype=torch.float32).fill_(1.0)
    return {
        "copy": 2 * num_bytes / best_s(lambda: target.copy_(source)) / 1e9,
        "read": num_bytes / best_s(source.sum) / 1e9,
        "read from huge pages": num_bytes / best_s(huge.sum) / 1e9,
    }


def matmul(dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    """GFLOP/s of one product."""
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    return 2 * rows * inner * columns / best_s(lambda: a @ b.T) / 1e9


def matvec(num_bytes: int) -> float:
    """GB/s of weights that a product with one row of bfloat16 reads."""
    inner = 1024
    weight = torch.randn(num_bytes // 2 // inner, inner).to(torch.bfloat16)
    row = torch.randn(1, inner).to(torch.bfloat16)
    return num_bytes / best_s(lambda: torch.nn.functional.linear(row, weight)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--json", help="write the numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    num_bytes = arguments.megabytes << 20
    found = {f"{name}, GB/s": value for name, value in memory(num_bytes).items()}
    found["one row of bfloat16 linear, GB/s"] = matvec(num_bytes)
    for dtype in DTYPES:
        for shape in SHAPES:
            name = f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}, GFLOP/s"
            found[name] = matmul(dtype, shape)
    for name, value in found.items():
        print(f"{name:<40}{value:8.1f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"threads": arguments.threads, **found}, file, indent=1)


if __name__ == "__main__":
    main()
