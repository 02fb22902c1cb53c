"""Rows of the main table of docs/paper.md: theirs, ours, the ratio."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

M = 2**20
MIX = "8B, 16 A100, 0.75/s, 5% long"
Results = dict[str, Any]


def step_rows(results: Results) -> list[tuple[str, ...]]:
    """Rows on the cost of single steps."""
    attention, static = results["attention"], results["static/512"]["tbt_max_s"]
    more = 100 * (attention["cost_32"] - 1)
    return [
        (
            "smallest chunk that saturates attention",
            "70B, 8 H100, 1M",
            "~40",
            f"{attention['saturating']}",
            _ratio(attention["saturating"], 40),
        ),
        (
            "attention of a prefill, chunk 32 against 2048",
            "70B, 8 H100, 1M",
            "+11%",
            f"{more:+.1f}%",
            _ratio(1 + more / 100, 1.11),
        ),
        (
            "decode that rides along a static chunk of 512",
            "8B, 8 H100, 1M",
            "~250 ms",
            f"{1e3 * static:.0f} ms",
            _ratio(static, 0.25),
        ),
    ]


def layout_rows(results: Results) -> list[tuple[str, ...]]:
    """One long request in each layout, and the scaling of the axes."""
    against = results[f"cp/llama3_8b/{M}"] / _ttft(results, "llama3_8b", M)
    meta_s = results[f"cp/llama3_405b/{M}"]
    return [
        (
            "SPP + TP against context parallelism",
            "8B, 128 H100, 1M",
            "1.64x faster",
            f"{against:.2f}x",
            _ratio(against, 1.64),
        ),
        *_ttft_rows(results),
        *_efficiency_rows(results),
        *_decode_rows(results),
        (
            "context parallelism, FP8 theirs, bfloat16 ours",
            "405B, 128 H100, 1M (Meta)",
            "77 s",
            f"{meta_s:.0f} s",
            _ratio(meta_s, 77),
        ),
    ]


def _ttft(results: Results, model: str, context: int) -> float:
    return results[f"alone/{model}/{context}/16"]["ttft_s"]


def _ttft_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for name, model, theirs_1m, theirs_10m in (
        ("8B", "llama3_8b", 8.5, 830.0),
        ("70B", "llama3_70b", 44.0, 4160.0),
    ):
        for context, theirs in ((M, theirs_1m), (10 * M, theirs_10m)):
            ours = _ttft(results, model, context)
            setting = f"{name}, 128 H100, {context // M}M"
            times = f"{theirs:,g} s", f"{ours:,.1f} s", _ratio(ours, theirs)
            yield ("TTFT, TP 8 x SPP 16", setting, *times)


def _efficiency_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for name, model, pp, said, theirs in (
        ("70B", "llama3_70b", 8, "85%", 0.85),
        ("8B", "llama3_8b", 16, ">= 80%", 0.8),
    ):
        ours = efficiency(results, model, M, pp)
        setting = f"{name}, {8 * pp} H100, 1M"
        yield f"scaling efficiency of SPP {pp}", setting, said, f"{ours:.0%}", _ratio(ours, theirs)


def _decode_rows(results: Results) -> list[tuple[str, ...]]:
    one, two = (results[f"tpot/llama3_8b/{10 * M}/{kvp}"]["tpot_s"] for kvp in (1, 2))
    flat, deep = (results[f"alone/llama3_8b/{2 * M}/{pp}"]["tpot_s"] for pp in (1, 8))
    return [
        (
            "TPOT, SPP 4 x TP 8 x KVP 2",
            "8B, 64 H100, 10M",
            "~33 ms",
            f"{1e3 * two:.1f} ms",
            _ratio(two, 0.033),
        ),
        (
            "the same against KVP 1",
            "8B, 10M",
            "-40%",
            f"{100 * (two / one - 1):.0f}%",
            _ratio(two / one, 0.6),
        ),
        (
            "decode penalty of SPP 8",
            "8B, H100, 2M",
            "+16%",
            f"{100 * (deep / flat - 1):+.0f}%",
            _ratio(deep / flat, 1.16),
        ),
        (
            "memory bandwidth that decode reaches",
            "H100, 4 to 10M",
            "up to 92%",
            "90%, an assumption",
            "",
        ),
    ]


def mix_rows(results: Results) -> list[tuple[str, ...]]:
    """Short and long requests together."""
    return [
        *_latency_rows(results),
        *_capacity_rows(results),
        *_packing_rows(results),
        *_deep_rows(results),
    ]


def _latency_rows(results: Results) -> Iterator[tuple[str, ...]]:
    ours = results["mix/lars/0.75"]
    for name, kind, label in (
        ("LoongServe-like", "ttft_s", "LARS against LoongServe-like, TTFT p50 / p99"),
        ("LoongServe-like", "short_ttft_s", "the same, short requests only"),
        (best_static(results, 0.75), "ttft_s", "LARS against FCFS, static chunk, TTFT p50 / p99"),
        (best_static(results, 0.75), "short_ttft_s", "the same, short requests only"),
    ):
        base = results[f"mix/{name}/0.75"]
        median, tail = (base[kind][i] / ours[kind][i] for i in (0, 2))
        theirs = "30x / 174x lower" if name == "LoongServe-like" and kind == "ttft_s" else ""
        ratio = f"{_two(median / 30)} / {_two(tail / 174)}" if theirs else ""
        yield label, MIX, theirs, f"{_two(median)}x / {_two(tail)}x lower", ratio


def _capacity_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for name in ("LoongServe-like", best_static(results, 0.75)):
        ratio = results["capacity/lars"] / results[f"capacity/{name}"]
        label = f"capacity of LARS against {name}"
        yield label, "8B, 16 A100, 5% long", "5x", f"{ratio:.1f}x", _ratio(ratio, 5)


def _packing_rows(results: Results) -> Iterator[tuple[str, ...]]:
    for policy, theirs in (("lrs", "1.6 to 1.8x lower"), ("lars", "")):
        plain = results[f"mix/{policy}, not packed/0.75"]["ttft_s"][0]
        gain = plain / results[f"mix/{policy}/0.75"]["ttft_s"][0]
        label = f"packing under {policy.upper()}, TTFT p50"
        yield label, MIX, theirs, f"{gain:.2f}x lower", _ratio(gain, 1.7) if theirs else ""


def _deep_rows(results: Results) -> Iterator[tuple[str, ...]]:
    setting = "70B, 64 H100, 5% of 2M, 1.75/s"
    for kind, label, theirs in (
        ("tpot_s", "TPOT p50 of 3D against 2D, short requests", "> 2x lower"),
        ("long_tpot_s", "the same, long requests", ""),
    ):
        best = min(results[f"mix70/{name}"][kind][0] for name in ("SPP 4, KVP 2", "SPP 2, KVP 4"))
        gain = results["mix70/SPP 8"][kind][0] / best
        yield label, setting, theirs, f"{gain:.2f}x lower", _ratio(gain, 2) if theirs else ""


def best_static(results: Results, rate: float) -> str:
    """The static chunk that does better at a rate: the fairer baseline."""
    names = ("vLLM-like, 512", "vLLM-like, 2048")
    return min(names, key=lambda name: results[f"mix/{name}/{rate}"]["ttft_s"][0])


def efficiency(results: Results, model: str, context: int, pp: int) -> float:
    """Scaling efficiency of sequence pipeline parallelism against one stage."""
    alone, many = (results[f"alone/{model}/{context}/{n}"]["ttft_s"] for n in (1, pp))
    return alone / many / pp


def _ratio(ours: float, theirs: float) -> str:
    return _two(ours / theirs)


def _two(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"
