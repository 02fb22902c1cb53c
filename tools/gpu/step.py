"""A whole decode step of a model of Llama-3-8B's shape against the bytes that it must read."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mnemosyne.attention.triton import TritonBackend
from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.pages import PagePool, free_memory
from mnemosyne.cache.table import PageTable
from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.operators import TORCH
from mnemosyne.parallel.mesh import single_mesh
from mnemosyne.request import SamplingParams
from mnemosyne.runtime.compile import CompiledModel
from mnemosyne.runtime.graphs import record_decodes
from mnemosyne.runtime.step import LayerShape, Model
from mnemosyne.runtime.worker import Worker
from mnemosyne.schedule.plan import Admission, Chunk, Plan
from tools.gpu.setting import Entry, Setting

CONTEXTS = (128 * 1024, 512 * 1024, 900 * 1024)
PAGE_SIZE = 128
WARM_UPS, STEPS = 2, 7
SPARE_BYTES = 3 * 2**30  # left for what a step computes on the way


def step(setting: Setting) -> Iterator[Entry]:
    """One decode at a time, from plan to sampled token, by the clock of the host.

    GB/s count the weights and all K and V once. Where the caches of all layers do not fit in
    memory, layers share some: one layer's keys outgrow the L2 cache many times over, so that
    every byte still comes from memory; each entry tells how many layers have one of their own.
    """
    spec, device = spec_of(setting), setting.device
    decoder = Decoder(spec, dtype=torch.bfloat16, device=device)
    for parameter in decoder.parameters():
        parameter.normal_(0.0, 0.02)
    # compiled when first called, for one row alone
    models: dict[str, Model] = {"eager": decoder}
    if not setting.smoke:
        models["compiled"] = CompiledModel(decoder, device)
    *_, fastest = models.values()
    for context in (150,) if setting.smoke else CONTEXTS:
        pool, num_own = pool_of(spec, context, device)
        amount = bytes_of(decoder, spec, context) / 1e9
        for name, model in models.items():
            worker = worker_of(setting, model, spec, pool, is_replayed=False)
            yield f"{name} {context}", entry_of(worker, context, amount, num_own)
        worker = worker_of(setting, fastest, spec, pool, is_replayed=True)
        yield f"replayed {context}", entry_of(worker, context, amount, num_own)
        del pool, worker
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU


def spec_of(setting: Setting) -> ModelSpec:
    """Llama-3-8B; a layer of the yardstick model in a smoke run."""
    if setting.smoke:
        return replace(bench_spec(), num_layers=1, windows=(None,))
    return ModelSpec(
        family="llama",
        vocab_size=128_256,
        width=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_width=14_336,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500_000.0, dim=128),
        tied=False,
        windows=(None,) * 32,
        max_positions=1 << 24,
        dtype="bfloat16",
    )


def pool_of(spec: ModelSpec, context: int, device: torch.device) -> tuple[PagePool, int]:
    """Random keys and values for a context, and how many layers have their own."""
    num_pages = pages_for(context + WARM_UPS + STEPS, PAGE_SIZE)
    layer_bytes = (num_pages + 1) * PAGE_SIZE * spec.kv_bytes_per_token(1)
    num_own = min(spec.num_layers, (free_memory(device) - SPARE_BYTES) // layer_bytes)
    assert num_own > 0, f"one layer's keys must fit: {layer_bytes} bytes"
    pool = PagePool(
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_layers=num_own,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=torch.bfloat16,
        device=device,
    )
    for tensor in (*pool.k, *pool.v):
        tensor.normal_()
    pool.k, pool.v = (_dealt(tensors, spec.num_layers) for tensors in (pool.k, pool.v))
    return pool, num_own


def bytes_of(decoder: Decoder, spec: ModelSpec, context: int) -> int:
    """Count what a decode must read: weights, K and V; of an embedding that is no head, one row."""
    weights = sum(parameter.nbytes for parameter in decoder.parameters())
    if decoder.embed is not None and not spec.tied:
        weights -= sum(parameter.nbytes for parameter in decoder.embed.parameters())
    return weights + context * spec.kv_bytes_per_token()


def worker_of(
    setting: Setting, model: Model, spec: ModelSpec, pool: PagePool, *, is_replayed: bool
) -> Worker:
    """The rank that runs the steps."""
    backend = TritonBackend(setting.configs)
    layers = LayerShape(windows=spec.windows, scale=spec.head_dim**-0.5)
    graphs = None
    if is_replayed:
        graphs = record_decodes(
            model, layers, pool, backend, TORCH, new_graph=setting.new_graph, rows=(1,)
        )
    return Worker(
        model,
        layers,
        pool=pool,
        backend=backend,
        operators=TORCH,
        device=setting.device,
        mesh=single_mesh(),
        graphs=graphs,
    )


def entry_of(worker: Worker, context: int, amount: float, num_own: int) -> dict[str, Any]:
    """Median seconds of a step after a context that is in the cache already."""
    num_pages = worker.pool.num_pages
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int64)
    tables = ((0, PageTable.on(0, pages)),)
    admission = Admission(
        request_id=0,
        prompt_ids=np.zeros(context, dtype=np.int64),
        params=SamplingParams(max_tokens=WARM_UPS + STEPS + 1, temperature=0.0),
        seed=0,
        end_token_ids=(),
    )
    times = []
    for index in range(WARM_UPS + STEPS):
        chunk = Chunk(0, context + index, 1, samples=True, token_id=index)
        first = {"admitted": (admission,), "tables": tables} if index == 0 else {}
        plan = Plan(index, (chunk,), **first)
        started_s = time.perf_counter()
        worker.run(plan)  # the sampled token is on the host when it returns
        times.append(time.perf_counter() - started_s)
    seconds = statistics.median(times[WARM_UPS:])
    return {"seconds": seconds, "GB_s": amount / seconds, "layers_with_own_cache": num_own}


def _dealt(tensors: Sequence[torch.Tensor], num_layers: int) -> list[torch.Tensor]:
    """One for each layer, in turns."""
    return [tensors[layer % len(tensors)] for layer in range(num_layers)]
