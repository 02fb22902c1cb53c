"""Prefills one prompt on the yardstick model and prints, in bytes, what memory it took at its peak.

Run as a program, because the peak of a process is that of its whole life:
``python -m tests.exactness.prefill_peak NUM_TOKENS CHUNK``
"""

from __future__ import annotations

import json
import sys

import numpy as np

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from tests.engines import model_of, pool_of


def memory(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS or VmHWM, in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def main(num_tokens: int, chunk: int | str) -> None:
    imported = memory("VmRSS")
    prompt = np.random.default_rng(0).integers(0, 32_000, num_tokens)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    cache = {"max_tokens": num_tokens + 1}
    with LLM("bench", device="cpu", cache=cache, schedule={"chunk": chunk}) as llm:
        (output,) = llm.generate(prompt, params)
        assert output.error is None
        pool = pool_of(llm)
        found = {
            "peak": memory("VmHWM"),
            "imported": imported,
            "weights": sum(parameter.nbytes for parameter in model_of(llm).parameters()),
            "pool": sum(part.nbytes for part in (*pool.k, *pool.v)),
            "chunks": output.metrics.chunks,
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2] if sys.argv[2] == "adaptive" else int(sys.argv[2]))
