"""Backends against float64, and the engine's tokens: on this device, and those of the CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from mnemosyne.attention import AttentionBackend, FlexBackend
from mnemosyne.attention.fixed_decodes import FixedDecodes
from mnemosyne.attention.triton import TritonBackend
from mnemosyne.kernels.configs import configs_for, shape_key
from tests.attention.cases import Case, Rows, listed_in, make_case
from tools.gpu.setting import Entry, Setting, refusal
from tools.gpu.speed import HEAD_DIM, PAGE_SIZES, describe

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = {2**14: ("float32", "bfloat16"), 2**18: ("bfloat16",), 2**20: ("bfloat16",)}
# Keys that fill blocks, and so many that they are split.
BLOCKS = (Rows(300, 700), Rows(1, 999), Rows(64, 0), Rows(1, 130), Rows(40, 2100), Rows(1, 3000))


def triton(setting: Setting) -> Iterator[Entry]:
    """Ragged decodes and chunks, empty rows and shards, by dtype, head ratio and window."""
    for group in (5,) if setting.smoke else (1, 3, 4, 8):
        case = make_case(heads=(2, group, 16 if setting.smoke else 64))
        for dtype in DTYPES[1:3] if setting.smoke else DTYPES:
            low = case.to(dtype, str(setting.device))
            for window in (40,) if setting.smoke else (None, 40):
                label = f"{str(dtype)[6:]} group {group} window {window}"
                yield label, errors_of(TritonBackend(), low, window)
    yield from candidates(setting)
    yield from replays(setting)


def flex(setting: Setting) -> Iterator[Entry]:
    """The same by FlexAttention; one head ratio, since each kernel takes seconds to compile."""
    case = make_case(heads=(2, 4, 16 if setting.smoke else 64))
    for dtype in () if setting.smoke else DTYPES[1:3]:
        low = case.to(dtype, str(setting.device))
        for window in (None, 40):
            yield f"{str(dtype)[6:]} group 4 window {window}", errors_of(FlexBackend(), low, window)


def candidates(setting: Setting) -> Iterator[Entry]:
    """Every way to build a kernel that the suite times, over whole blocks of keys."""
    for page_size in PAGE_SIZES[:1] if setting.smoke else PAGE_SIZES:
        heads = (1, 4, 16) if setting.smoke else (2, 4, HEAD_DIM)
        case = make_case(BLOCKS, heads=heads, page_size=page_size, num_pages=16384 // page_size)
        low = case.to(torch.bfloat16, str(setting.device))
        for kind in ("decode", "chunk"):
            shape = shape_key(kind, heads[-1], page_size)
            for config in configs_for(
                kind, torch.bfloat16, heads[-1], page_size, setting.capability
            ):
                try:
                    entry = errors_of(TritonBackend({shape: config}), low, None)
                except TritonError as error:
                    entry = refusal(error)
                yield f"{shape} {describe(config)}", entry


def replays(setting: Setting) -> Iterator[Entry]:
    """Decodes replayed from a graph that was captured over other lengths."""
    steps = [
        make_case([Rows(1, last) for last in lengths], heads=(2, 4, 16), seed=seed).to(
            torch.bfloat16, str(setting.device)
        )
        for seed, lengths in enumerate(((0, 1, 2), (1100, 0, 99), (15, 300, 300)))
    ]
    backend, q, k, v = TritonBackend(), *(torch.empty_like(x) for x in tensors_of(steps[0]))
    page_ids = torch.zeros(256, dtype=torch.int32, device=setting.device)
    fixed = FixedDecodes(backend, k, num_rows=len(q), page_size=16, page_ids=page_ids)
    tables = fixed.prepare(listed_in(steps[0].batch, page_ids), None, setting.device)
    graph = setting.new_graph()
    out = graph.capture(lambda: fixed.attend(q, k, v, tables, scale=steps[0].scale)[0])
    for index, case in enumerate(steps):
        for static, now in zip((q, k, v), tensors_of(case), strict=True):
            static.copy_(now)
        fixed.prepare(listed_in(case.batch, page_ids), None, setting.device)
        graph.replay()
        same = torch.equal(out, case.attend(backend)[0])
        yield (
            f"replayed decodes {index}",
            {"same_bits": same} | ({} if same else {"failed": "must be the bits of a launch"}),
        )


def tensors_of(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return case.q_THD, case.k_KSD, case.v_KSD


def errors_of(backend: AttentionBackend, low: Case, window: int | None) -> dict[str, Any]:
    """Largest errors of output and LSE; each at most twice that of plain torch in the dtype."""
    dtype = low.q_THD.dtype
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


def needle(setting: Setting) -> Iterator[Entry]:
    """Find the passkey in ever longer texts, and compare with the CPU."""
    if setting.smoke:
        yield "float32 256", recite(256, "float32", setting, has_others=True)
        return
    # Without tensor cores a prefill of 256K in float32 takes minutes.
    for length, dtypes in LENGTHS.items():
        for dtype in dtypes:
            is_first = length == min(LENGTHS)
            yield f"{dtype} {length}", recite(length, dtype, setting, has_others=is_first)


def far(setting: Setting) -> Iterator[Entry]:
    """The same at 4M tokens: 3.6e16 FLOP of attention, a minute or two."""
    length = 128 if setting.smoke else 2**22
    yield f"bfloat16 {length}", recite(length, "bfloat16", setting, has_others=False)


def recite(length: int, dtype: str, setting: Setting, *, has_others: bool) -> dict[str, Any]:
    """One text; ``has_others``: the CPU, and decodes that are replayed, must answer alike."""
    # Here, so that a machine without the engine's packages still tests attention.
    from mnemosyne.model_zoo.haystack import haystack

    recital = haystack(length, depth=0.3)
    started_s = time.perf_counter()
    tokens = answer(recital, dtype, setting)
    entry: dict[str, Any] = {"engine_s": time.perf_counter() - started_s}
    entry["found"] = tokens == list(recital.answer_ids)
    if not entry["found"]:
        entry["failed"] = f"the passkey must come back, got {tokens}"
    return entry | (compare(recital, dtype, setting, tokens) if has_others else {})


def compare(recital: Any, dtype: str, setting: Setting, tokens: list[int]) -> dict[str, Any]:
    """Compare tokens with those of the CPU, and of decodes that are replayed."""
    others = {"same_as_cpu": answer(recital, dtype, setting, device="cpu", attention="cpu")}
    if not setting.smoke:
        others["same_replayed"] = answer(recital, dtype, setting, compile="step")
    found: dict[str, Any] = {key: other == tokens for key, other in others.items()}
    wrong = [key for key, same in found.items() if not same]
    return found | ({"failed": f"{', '.join(wrong)} must hold"} if wrong else {})


def answer(recital: Any, dtype: str, setting: Setting, **options: Any) -> list[int]:
    """The tokens of the engine, greedy."""
    from mnemosyne.llm import LLM
    from mnemosyne.model_zoo.needle import write_needle
    from mnemosyne.request import SamplingParams

    arguments = {"device": str(setting.device), "attention": "triton"} | options
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            str(write_needle(Path(folder) / "needle")),
            dtype=dtype,
            schedule={"chunk": 64 if setting.smoke else 8192},
            cache={"max_tokens": len(recital.prompt_ids) + 1024},
            **arguments,
        ) as llm,
    ):
        params = SamplingParams(max_tokens=len(recital.answer_ids), temperature=0.0)
        (output,) = llm.generate([recital.prompt_ids], params)
        return list(output.token_ids)
