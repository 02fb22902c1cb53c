"""Prefills one prompt on the yardstick model and prints, in bytes, what that took at its peak.

Run as a program, because the peak of a process is that of its whole life:
``python -m tests.exactness.prefill_peak NUM_TOKENS CHUNK``
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from tests.engines import pool_of


def memory(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def start_peak() -> int:
    """Give back what is free and let the peak begin here; the bytes that are left."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def main(num_tokens: int, chunk: int | str) -> None:
    prompt = np.random.default_rng(0).integers(0, 32_000, num_tokens)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    cache = {"max_tokens": num_tokens + 1}
    with LLM("bench", device="cpu", cache=cache, schedule={"chunk": chunk}) as llm:
        loaded = start_peak()  # weights are in it, the pool is not written yet
        (output,) = llm.generate(prompt, params)
        assert output.error is None
        pool = pool_of(llm)
        found = {
            "peak": memory("VmHWM"),
            "loaded": loaded,
            "pool": sum(part.nbytes for part in (*pool.k, *pool.v)),
            "chunks": output.metrics.chunks,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if sys.argv[2] == "adaptive" else int(sys.argv[2]))
