"""Costs of single steps: chunks that saturate attention, and context parallelism as a baseline."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

from runs import simulate_config

from mnemosyne.cli.shapes import find_shape
from mnemosyne.config import MeshConfig
from mnemosyne.joining.simulated import stages_of
from mnemosyne.simulate.cost import GroupLoad, StepCost


def step_cost(model: str, mesh: MeshConfig, hardware: str = "h100") -> StepCost:
    """The cost of steps of a model on some hardware."""
    config, shape = simulate_config(model, f"hardware={hardware}"), find_shape(model)
    stages = stages_of(shape, mesh)
    return StepCost(shape, config.hardware, config.efficiency, mesh, stages)


def attention_s(cost: StepCost, chunk: int, context: int) -> float:
    """Seconds of attention of a chunk whose last token is the last of the context."""
    with_keys = GroupLoad(rows=chunk, chunks=[(chunk * (context - chunk / 2), context)])
    return sum(cost.stage_s([with_keys])) - sum(cost.stage_s([GroupLoad(rows=chunk)]))


def attention_of_prefill_s(cost: StepCost, chunk: int, context: int) -> float:
    """Seconds of attention of a whole prefill in chunks of one size."""
    # linear in the position, but for the side of the roofline, which the chunk decides
    return context / chunk * attention_s(cost, chunk, context // 2)


def saturating_chunk(cost: StepCost, context: int) -> int:
    """The smallest chunk at which attention runs within 1% of its best rate."""
    chunk, best_s = 1, pair_s(cost, 4096, context)
    while pair_s(cost, chunk, context) > 1.01 * best_s:
        chunk += 1
    return chunk


def pair_s(cost: StepCost, chunk: int, context: int) -> float:
    """Seconds of attention per pair of query and key."""
    return attention_s(cost, chunk, context) / (chunk * (context - chunk / 2))


def context_parallel_s(model: str, context: int, ranks: int, tp: int = 8) -> float:
    """TTFT of a whole prefill by ring attention, pass-KV, over ``ranks`` groups of ``tp`` GPUs.

    Every rank holds two pieces of the prompt, an early and a late one, which balances the causal
    work. It computes its rows through each layer, and in ``ranks`` rounds attends to the keys of
    one rank while it passes them on: a round takes the longer of the two.

    Source: Meta's context parallelism, arXiv 2411.01783, as the whole prompt in one pass.
    """
    mesh = MeshConfig(tp=tp)
    cost, shape = step_cost(model, mesh), find_shape(model)
    config = simulate_config(model)
    rows, layers = context // ranks, shape.num_layers
    linear_s = sum(cost.stage_s([GroupLoad(rows=rows, num_sampled=1)]))
    pairs = context**2 / 2 / ranks
    load = GroupLoad(rows=rows, chunks=[(pairs, 0.0)])
    attention = sum(cost.stage_s([load])) - sum(cost.stage_s([GroupLoad(rows=rows)]))
    kv_bytes = rows * 2 * max(1, shape.num_kv_heads // tp) * shape.head_dim * 2
    link = config.hardware.network_gb_per_s * 1e9 * config.efficiency.links
    send_s = kv_bytes / link + config.efficiency.network_latency_s
    round_s = max(attention / layers / ranks, send_s)
    return linear_s + layers * ranks * round_s


def prefill_flops(model: str, context: int) -> float:
    """Operations of a prefill, causal: two per weight and token, four per pair and head width."""
    shape = find_shape(model)
    layer = shape.width * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    layer += 3 * shape.width * shape.mlp_width * shape.experts_per_token
    pairs = context**2 / 2
    return shape.num_layers * (2 * layer * context + 4 * pairs * shape.num_heads * shape.head_dim)


def attention_table() -> dict[str, Any]:
    """The rate of attention by the size of a chunk, Llama-3 70B on eight H100."""
    cost, context = step_cost("llama3_70b", MeshConfig(tp=8)), 2**20
    sizes = [2**power for power in range(13)]
    best = pair_s(cost, sizes[-1], context)
    peak = saturating_chunk(_at_peaks(cost), context)
    return {
        "saturating": saturating_chunk(cost, context),
        "saturating_at_peaks": peak,
        "share": {str(size): best / pair_s(cost, size, context) for size in sizes},
        "cost_32": attention_of_prefill_s(cost, 32, context)
        / attention_of_prefill_s(cost, 2048, context),
    }


def _at_peaks(cost: StepCost) -> StepCost:
    """The same hardware if attention and reads of the cache reached their peaks."""
    at_peaks = copy(cost)
    at_peaks.rates = replace(cost.rates, attention=1.0, kv=1.0)
    return at_peaks
