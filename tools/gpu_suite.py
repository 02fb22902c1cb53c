"""Is attention right on this GPU, and how fast? One call, under nine minutes.

    python tools/gpu_suite.py --json gpu.json    # on a machine with a GPU
    python tools/gpu_suite.py --cpu-smoke        # tiny shapes in Triton's interpreter: does it run?

Every section is a process of its own with a time budget: one that fails or hangs is an entry in the
JSON and does not end the others. Prefill counts the FLOP of the causal half; decode counts K and V.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

BUDGETS_S = {"machine": 60, "correct": 120, "needle": 120, "decode": 110, "chunk": 110}
ROOT = Path(__file__).resolve().parent.parent
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 128
CHUNK_ROWS = 2048


def machine(smoke: bool) -> dict[str, Any]:
    """The peaks that everything else is held against: a copy and a matmul, measured."""
    import torch

    device, size = ("cpu", 256) if smoke else ("cuda", 8192)
    a = torch.randn(size, size, device=device).bfloat16()
    source = torch.zeros(2**20 if smoke else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s, matmul_s = seconds_of(lambda: target.copy_(source)), seconds_of(lambda: a @ a)
    return {
        "device": "cpu" if smoke else torch.cuda.get_device_name(),
        "copy_GB_s": 2 * source.numel() / copy_s / 1e9,
        "matmul_TFLOP_s": 2 * size**3 / matmul_s / 1e12,
    }


def correct(smoke: bool) -> dict[str, Any]:
    """Largest error against float64; the budget is 2 eps of the dtype times the largest output."""
    import torch

    from mnemosyne.attention import choose_backend

    device = torch.device("cpu" if smoke else "cuda")
    results = {}
    for group in (1, 4) if smoke else (1, 3, 4, 8):
        q, k, v, batch = make_case([1, 40, 0, 65], rows=3, group=group, device=device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            low = tuple(x.to(dtype) for x in (q, k, v))
            rounded = tuple(x.double() for x in low)
            reference = choose_backend("reference", device=device, dtype=q.dtype, head_dim=64)
            exact = attend(reference, *rounded, batch)
            budget = 2 * torch.finfo(dtype).eps * exact.abs().max().item()
            for name in ("triton",) if smoke else ("triton", "flex"):
                backend = choose_backend(name, device=device, dtype=dtype, head_dim=64)
                error = (attend(backend, *low, batch).double() - exact).abs().max().item()
                results[f"{name} {dtype} group {group}"] = {"error": error, "budget": budget}
    wrong = {key: value for key, value in results.items() if not value["error"] <= value["budget"]}
    if wrong:
        sys.exit(f"errors must stay within their budgets, got {wrong}")
    return results


def needle(smoke: bool) -> dict[str, Any]:
    """Whether the passkey comes back from ever longer texts."""
    import tempfile

    from mnemosyne.llm import LLM
    from mnemosyne.model_zoo.haystack import haystack
    from mnemosyne.model_zoo.needle import write_needle
    from mnemosyne.request import SamplingParams

    results = {}
    for dtype in ("float32",) if smoke else ("float32", "bfloat16"):
        for length in (256,) if smoke else (2**14, 2**18, 2**22):
            recital = haystack(length, depth=0.3)
            with (
                tempfile.TemporaryDirectory() as folder,
                LLM(
                    str(write_needle(Path(folder) / "needle")),
                    dtype=dtype,
                    device="cpu" if smoke else "cuda",
                    attention="triton",
                    schedule={"chunk": 64 if smoke else 8192},
                    cache={"max_tokens": 2 * length},
                ) as llm,
            ):
                params = SamplingParams(max_tokens=len(recital.answer_ids), temperature=0.0)
                started_s = time.perf_counter()
                (output,) = llm.generate([recital.prompt_ids], params)
                found = list(output.token_ids) == list(recital.answer_ids)
                seconds = time.perf_counter() - started_s
                results[f"{dtype} {length}"] = {"found": found, "seconds": seconds}
    if not all(result["found"] for result in results.values()):
        sys.exit(f"every passkey must be found, got {results}")
    return results


def decode(smoke: bool) -> dict[str, Any]:
    """GB/s of K and V read by one row, by backend and keys."""
    return speeds(smoke, rows=1, count=lambda keys: 4 * keys * KV_HEADS * HEAD_DIM / 1e9)


def chunk(smoke: bool) -> dict[str, Any]:
    """TFLOP/s of the last chunk of a prompt, causal count, by backend and keys."""
    rows = 16 if smoke else CHUNK_ROWS
    return speeds(smoke, rows, lambda keys: 4 * HEADS * HEAD_DIM * rows * (keys - rows / 2) / 1e12)


def speeds(smoke: bool, rows: int, count: Callable[[int], float]) -> dict[str, Any]:
    import torch

    from mnemosyne.attention import choose_backend

    device = torch.device("cpu" if smoke else "cuda")
    results = {}
    for keys in (256,) if smoke else (2**13, 2**16, 2**17, 2**20, 2**22):
        q, k, v, batch = make_case(
            [keys - rows],
            rows,
            HEADS // KV_HEADS,
            device,
            KV_HEADS,
            HEAD_DIM,
            PAGE_SIZE,
            torch.bfloat16,
        )
        for name in ("triton",) if smoke else ("triton", "flex"):
            backend = choose_backend(name, device=device, dtype=q.dtype, head_dim=HEAD_DIM)
            prepared = backend.prepare(batch, None, device)
            seconds = seconds_of(partial(backend.attend, q, k, v, prepared, scale=0.088), smoke)
            results[f"{name} {keys}"] = count(keys) / seconds
        print(keys, results, file=sys.stderr, flush=True)
    return results


def make_case(
    past: list[int],
    rows: int,
    group: int,
    device: Any,
    kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 16,
    dtype: Any = None,
) -> Any:
    """Sequences of some past keys and ``rows`` new ones (every second a decode), shuffled pages."""
    import numpy as np
    import torch

    from mnemosyne.attention import AttentionBatch, Segment

    lengths = [(n, rows if i % 2 == 0 else 1) for i, n in enumerate(past)]
    needed = [-(-(n + r) // page_size) for n, r in lengths]
    order = np.random.default_rng(0).permutation(sum(needed)).astype(np.int64)
    segments, row, page = [], 0, 0
    for (n, r), pages in zip(lengths, needed, strict=True):
        segments.append(Segment(row, r, n, n + r, order[page : page + pages]))
        row, page = row + r, page + pages
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "dtype": dtype or torch.float64, "device": device}
    k, v = (torch.randn(kv_heads, page * page_size, head_dim, **options) for _ in "kv")
    q = torch.randn(row, kv_heads * group, head_dim, **options)
    return q, k, v, AttentionBatch(tuple(segments), row, page_size)


def attend(backend: Any, q: Any, k: Any, v: Any, batch: Any) -> Any:
    prepared = backend.prepare(batch, None, q.device)
    return backend.attend(q, k, v, prepared, scale=0.125)[0]


def seconds_of(work: Callable[[], object], smoke: bool = False) -> float:
    """Median of several runs, by CUDA events where there is a GPU."""
    import torch

    work()
    times = []
    for _ in range(1 if smoke else 7):
        if torch.cuda.is_available():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
            start.record()
            work()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) / 1000)
        else:
            started_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - started_s)
    return sorted(times)[len(times) // 2]


SECTIONS = {f.__name__: f for f in (machine, correct, needle, decode, chunk)}


def run_section(name: str, smoke: bool) -> dict[str, Any]:
    """One section in a process of its own."""
    command = [sys.executable, __file__, "--section", name, *(["--cpu-smoke"] if smoke else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if smoke:
        environment["TRITON_INTERPRET"] = "1"
    started_s = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=BUDGETS_S[name]
        )
    except subprocess.TimeoutExpired as late:
        text = late.stderr or b""
        return {"failed": f"took over {BUDGETS_S[name]} s", "log": str(text)[-2000:]}
    seconds = time.perf_counter() - started_s
    if done.returncode:
        return {"failed": done.stderr[-2000:], "seconds": seconds}
    return {"result": json.loads(done.stdout.splitlines()[-1]), "seconds": seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny shapes, no GPU")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here, print its JSON")
    options = parser.parse_args()
    if options.section:
        print(json.dumps(SECTIONS[options.section](options.cpu_smoke)))
        return 0
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    report: dict[str, Any] = {"commit": commit, "smoke": options.cpu_smoke}
    report["versions"] = {name: version(name) for name in ("torch", "triton")}
    report["sections"] = {}
    for name in SECTIONS:
        report["sections"][name] = section = run_section(name, options.cpu_smoke)
        print(f"{name}: {json.dumps(section, indent=1)}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any("failed" in section for section in report["sections"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
