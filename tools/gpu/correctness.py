"""Backends against float64, and the engine's tokens: on this device, and those of the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemosyne.attention import choose_backend
from tests.attention.cases import Case, make_case
from tools.gpu.timing import Entry, device_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def correct(smoke: bool) -> Iterator[Entry]:
    """Ragged decodes and chunks, empty rows and shards, by dtype, head ratio and window."""
    device = device_of(smoke)
    for group in (5,) if smoke else (1, 3, 4, 8):
        case = make_case(heads=(2, group, 16 if smoke else 64))
        for dtype in DTYPES[1:3] if smoke else DTYPES:
            low = case.to(dtype, str(device))
            for window in (40,) if smoke else (None, 40):
                for name in ("triton",) if smoke else ("triton", "flex"):
                    label = f"{name} {str(dtype)[6:]} group {group} window {window}"
                    yield label, errors_of(name, low, window)


def errors_of(name: str, low: Case, window: int | None) -> dict[str, Any]:
    """Largest errors of output and LSE; each at most twice that of plain torch in the dtype."""
    dtype, head_dim = low.q_THD.dtype, low.q_THD.shape[-1]
    backend = choose_backend(name, device=low.q_THD.device, dtype=dtype, head_dim=head_dim)
    actual = low.attend(backend, window, return_lse=True)
    eager = low.dense(window)
    exact = low.to(torch.float64, str(low.q_THD.device)).dense(window)
    entry: dict[str, Any] = {}
    for key, *results in zip(("out", "lse"), actual, eager, exact, strict=True):
        found, plain, right = (torch.as_tensor(x).double() for x in results)
        budget = 2 * largest(plain - right) + torch.finfo(dtype).eps * largest(right)
        # Plain torch in float64 is itself what is exact: there sums may differ in their order.
        entry[key] = {"error": largest(found - right), "budget": max(budget, 1e-14)}
        if found.isnan().any() or not torch.equal(found.isneginf(), right.isneginf()):
            entry["failed"] = f"{key} must be a number, and -inf where no key is seen"
        if not entry[key]["error"] <= entry[key]["budget"]:
            entry["failed"] = f"{key} is further off than twice plain torch"
    return entry


def largest(x: Tensor) -> float:
    """Largest magnitude, apart from rows that saw no key: -inf, or nan as a difference of two."""
    return x.masked_fill(x.isneginf(), 0).nan_to_num(0.0, posinf=float("inf")).abs().max().item()


def needle(smoke: bool) -> Iterator[Entry]:
    """Whether the passkey comes back from ever longer texts, and what the CPU answers."""
    # Here, so that a machine without the engine's packages still tests attention.
    from mnemosyne.model_zoo.haystack import haystack

    lengths = (256,) if smoke else (2**14, 2**18, 2**20, 2**22)
    for length in lengths:
        for dtype in ("float32",) if smoke else ("float32", "bfloat16"):
            recital = haystack(length, depth=0.3)
            started_s = time.perf_counter()
            tokens = answer(recital, dtype, "cpu" if smoke else "cuda", "triton", smoke)
            entry: dict[str, Any] = {"seconds": time.perf_counter() - started_s}
            entry["found"] = tokens == list(recital.answer_ids)
            if not entry["found"]:
                entry["failed"] = f"the passkey must come back, got {tokens}"
            if length == lengths[0]:
                entry["same_as_cpu"] = tokens == answer(recital, dtype, "cpu", "cpu", smoke)
                if not entry["same_as_cpu"]:
                    entry["failed"] = "tokens must be those of the CPU"
            yield f"{dtype} {length}", entry


def answer(recital: Any, dtype: str, device: str, attention: str, smoke: bool) -> list[int]:
    """The tokens of the engine, greedy."""
    from mnemosyne.llm import LLM
    from mnemosyne.model_zoo.needle import write_needle
    from mnemosyne.request import SamplingParams

    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            str(write_needle(Path(folder) / "needle")),
            dtype=dtype,
            device=device,
            attention=attention,
            schedule={"chunk": 64 if smoke else 8192},
            cache={"max_tokens": len(recital.prompt_ids) + 1024},
        ) as llm,
    ):
        params = SamplingParams(max_tokens=len(recital.answer_ids), temperature=0.0)
        (output,) = llm.generate([recital.prompt_ids], params)
        return list(output.token_ids)
