"""Config in, this rank's part of an engine out: its layers, its pages, what computes a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mnemosyne.attention.kvp import start_exchange
from mnemosyne.cache.capacity import (
    count_pages,
    describe_cache,
    kinds_of,
    most_rows,
    tokens_per_group,
)
from mnemosyne.cache.kinds import PageKinds
from mnemosyne.cache.pages import PagePool
from mnemosyne.config import EngineConfig, MetricsConfig
from mnemosyne.joining.checkpoint import Checkpoint, Progress, find_checkpoint, weight_bytes
from mnemosyne.joining.compute import AS_THEY_ARE, Compute, Wraps, choose_compute
from mnemosyne.joining.device import choose_device
from mnemosyne.joining.leaves import open_leaves
from mnemosyne.kernels.cpu.memory import keep_freed
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.parallel.collectives import gather_counts
from mnemosyne.parallel.mesh import (
    Mesh,
    check_mesh,
    check_world_size,
    count_processes,
    init_mesh,
    ranks_on_host,
)
from mnemosyne.parallel.pipeline import Pipeline
from mnemosyne.parallel.trace import Trace
from mnemosyne.runtime.leaves import RankLeaves
from mnemosyne.runtime.step import LayerShape, Model
from mnemosyne.runtime.worker import Worker
from mnemosyne.serve.intake import Intake
from mnemosyne.shape import ModelShape

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rank:
    """The part of a model, ready to serve, that this process holds."""

    mesh: Mesh
    checkpoint: Checkpoint
    worker: Worker
    intake: Intake
    num_pages: int  # of each group
    tokens_per_group: int  # of one request
    trace: Trace | None  # of what this rank does
    metrics: MetricsConfig  # where rank 0 writes it
    backend: str  # of attention
    operators: str  # of all else
    leaves: RankLeaves | None  # the way to the disk, if there is one


def build_rank(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    compiling: Progress | None = None,
    wraps: Wraps = AS_THEY_ARE,
) -> Rank:
    """Load this rank's layers and slices, and give it its pages. Every rank calls it.

    Args:
        config: all choices, the same on every rank.
        progress: called while weights are fetched and read.
        compiling: called while the model is compiled.
        wraps: what a bench puts around its parts.

    Raises:
        ValueError: for a checkpoint, device, mesh or memory that cannot be used; for all that the
            config alone shows, before any weight is read.
    """
    device, checkpoint = _find(config, progress)
    if device.type == "cpu":
        keep_freed()
    spec, local = checkpoint.spec, _local_shape(config, checkpoint)
    compute = choose_compute(
        config,
        device=device,
        local=local,
        wraps=wraps,
        is_recordable=spec.is_recordable,
        is_static=spec.is_static,
    )
    mesh = init_mesh(config.mesh, device.type)
    decoder = checkpoint.decoder(mesh, compute.dtype, compute.operators)
    kinds = kinds_of(spec.windows, config.cache)
    token_bytes = local.kv_bytes_per_token(kinds.layers_per_page(_windows(decoder)))
    num_pages = _count_pages(config, decoder, token_bytes, device, kinds)
    intake = _intake(checkpoint)
    num_pages = min(gather_counts(num_pages, mesh))  # the driver hands them out to all ranks
    max_tokens = tokens_per_group(config.cache, num_pages, kinds)
    num_bytes = gather_counts(checkpoint.load(decoder, device, progress), mesh)
    trace = _trace(config.metrics, mesh, device)
    model = wraps.model(compute.model(decoder, compiling))
    pool = _pool(config, num_pages, local, _windows(decoder), compute, kinds)
    leaves = open_leaves(config.cache, checkpoint, compute, pool, mesh)
    worker = _worker(decoder, model, pool, compute, mesh, wraps, trace, leaves)
    rank = Rank(
        *(mesh, checkpoint, worker, intake, num_pages, max_tokens, trace, config.metrics),
        backend=compute.backend.name,
        operators=compute.operators.name,
        leaves=leaves,
    )
    _announce(rank, f"{compute.dtype} on {device}", num_bytes, token_bytes)
    return rank


def _local_shape(config: EngineConfig, checkpoint: Checkpoint) -> ModelShape:
    """This rank's part of the model, in the dtype that it computes in."""
    local = checkpoint.spec.local(config.mesh)
    return local if config.dtype == "auto" else replace(local, dtype=config.dtype)


def _worker(
    decoder: Decoder,
    model: Model,
    pool: PagePool,
    compute: Compute,
    mesh: Mesh,
    wraps: Wraps,
    trace: Trace | None,
    leaves: RankLeaves | None,
) -> Worker:
    layers = _layer_shape(decoder, decoder.spec)
    return Worker(
        model,
        layers,
        pool=pool,
        backend=compute.backend,
        operators=compute.operators,
        device=compute.device,
        mesh=mesh,
        pipeline=_pipeline(mesh, decoder.width, compute, trace),
        trace=trace,
        graphs=compute.graphs(model, layers, pool),
        exchange=wraps.exchange(start_exchange),
        leaves=leaves,
    )


def _announce(rank: Rank, where: str, num_bytes: Sequence[int], token_bytes: int) -> None:
    """Say what was loaded and what fits."""
    if any(num_bytes):
        log.info("%s", describe_reads(num_bytes))
    parts = f"{rank.backend} attention, {rank.operators} operators"
    log.info("%s, %s, %s", rank.checkpoint.name, where, parts)
    said = describe_cache(
        rank.num_pages,
        rank.worker.pool.kinds,
        token_bytes=token_bytes,
        num_groups=rank.mesh.kvp.degree,
        max_tokens_per_group=rank.tokens_per_group,
    )
    log.info("%s", said)


def describe_reads(num_bytes: Sequence[int]) -> str:
    """One line: how much of the weights each rank read."""
    sizes = ", ".join(f"{count / 1e6:,.1f}" for count in num_bytes)
    return f"weights read: {sizes} MB" + (" by rank" if len(num_bytes) > 1 else "")


def _find(config: EngineConfig, progress: Progress | None) -> tuple[torch.device, Checkpoint]:
    """Device and model, once mesh and model fit each other and the processes."""
    num_processes = count_processes()
    device = choose_device(config.device, num_processes)
    check_world_size(config.mesh, num_processes)
    checkpoint = find_checkpoint(config.model, progress)
    check_mesh(config.mesh, checkpoint.spec)
    _check_chunks(checkpoint.spec, config.cache.page_size)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device, checkpoint


def _check_chunks(spec: ModelSpec, page_size: int) -> None:
    """Refuse pages that do not begin where chunks of attention do."""
    for size in filter(None, spec.windows if spec.chunked else ()):
        if size % page_size:
            raise ValueError(
                f"cache.page_size must divide the {size} positions of a chunk that the model "
                f"attends to, got {page_size}; use a smaller power of two"
            )


def _windows(decoder: Decoder) -> list[int | None]:
    """The windows of the layers held here."""
    return [decoder.spec.windows[int(index)] for index in decoder.layers]


def _pool(
    config: EngineConfig,
    num_pages: int,
    local: ModelShape,
    windows: list[int | None],
    compute: Compute,
    kinds: PageKinds,
) -> PagePool:
    return PagePool(
        num_pages=num_pages,
        page_size=config.cache.page_size,
        num_layers=len(windows),
        num_kv_heads=local.num_kv_heads,
        head_dim=local.head_dim,
        dtype=compute.dtype,
        device=compute.device,
        kinds=kinds,
        windows=windows,
        max_rows=most_rows(config.schedule),
    )


def _count_pages(
    config: EngineConfig,
    decoder: Decoder,
    token_bytes: int,
    device: torch.device,
    kinds: PageKinds,
) -> int:
    return count_pages(
        config.cache,
        token_bytes=token_bytes,
        weight_bytes=weight_bytes(decoder),
        device=device,
        num_sharing=ranks_on_host() if device.type == "cpu" else 1,
        num_tracks=kinds.num_tracks,
        num_passing=kinds.num_passing(most_rows(config.schedule)),
    )


def _intake(checkpoint: Checkpoint) -> Intake:
    return Intake(
        vocab_size=checkpoint.spec.vocab_size,
        max_positions=checkpoint.spec.max_positions,
        defaults=checkpoint.defaults(),
        tokenizer=checkpoint.tokenizer(),
        model=checkpoint.name,
    )


def _layer_shape(decoder: Decoder, spec: ModelSpec) -> LayerShape:
    windows = [spec.reaches[int(index)] for index in decoder.layers]
    return LayerShape(windows=windows, scale=spec.scale_of_scores)


def _pipeline(mesh: Mesh, width: int, compute: Compute, trace: Trace | None) -> Pipeline | None:
    if mesh.pp.degree == 1:
        return None
    return Pipeline(mesh, width=width, dtype=compute.dtype, device=compute.device, trace=trace)


def _trace(config: MetricsConfig, mesh: Mesh, device: torch.device) -> Trace | None:
    if config.trace is None:
        return None
    synchronize = torch.cuda.current_stream().synchronize if device.type == "cuda" else None
    return Trace(mesh.rank, mesh.label, synchronize=synchronize)
