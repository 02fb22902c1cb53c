"""The one place that joins the rooms: config in, engine out."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mnemosyne.attention import choose_backend
from mnemosyne.cache.allocator import PageAllocator
from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.pages import PagePool, bytes_per_token, free_memory
from mnemosyne.config import CacheConfig, EngineConfig, MeshConfig
from mnemosyne.metrics import StepRecord
from mnemosyne.model_zoo.bench import bench_spec, init_random
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.model_zoo.spec import ModelSpec, read_spec
from mnemosyne.runtime.executor import LocalExecutor
from mnemosyne.runtime.weights import load_weights
from mnemosyne.runtime.worker import LayerShape, Worker
from mnemosyne.schedule.calibrate import Limits, calibrate
from mnemosyne.schedule.plan import Executor
from mnemosyne.schedule.predictor import LinearPredictor, Predictor
from mnemosyne.schedule.routing import Router
from mnemosyne.schedule.scheduler import Scheduler
from mnemosyne.schedule.work import WorkModel
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.engine import Engine
from mnemosyne.serve.intake import Intake
from mnemosyne.serve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # bytes of weights read, bytes in all

BENCH_SEED = 0


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its weights, and what belongs to it."""

    name: str
    spec: ModelSpec
    decoder: Decoder
    tokenizer: Tokenizer | None
    defaults: GenerationDefaults


def build_engine(
    config: EngineConfig,
    *,
    predictor: Predictor | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load a model and make it ready to serve.

    Args:
        config: all choices.
        predictor: step time, in place of the one fitted by a sweep at start-up.
        on_step: called with the record of each step.
        progress: called while weights are read.

    Raises:
        ValueError: for a checkpoint, device, mesh or memory that cannot be used.
    """
    check_mesh(config.mesh)
    device = choose_device(config.device)
    spec, path = find_model(config.model)
    dtype = getattr(torch, spec.dtype if config.dtype == "auto" else config.dtype)
    backend = choose_backend(config.attention, device=device, dtype=dtype)
    num_pages = count_pages(config.cache, spec, dtype, device)
    model = load_model(config.model, spec, path, dtype, device, progress)
    pool = PagePool(
        num_pages=num_pages,
        page_size=config.cache.page_size,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
        device=device,
    )
    layers = LayerShape(windows=spec.windows, scale=spec.head_dim**-0.5)
    worker = Worker(model.decoder, layers, pool=pool, backend=backend, device=device)
    executor = LocalExecutor(worker)
    work_model = WorkModel(spec.windows)
    if predictor is None:
        predictor = LinearPredictor()
        if config.schedule.is_adaptive:
            _fit(predictor, executor, work_model, config, spec, num_pages)
    scheduler = Scheduler(
        config.schedule,
        config.slo,
        router=Router(
            [PageAllocator(num_pages)],
            page_size=config.cache.page_size,
            max_tokens_per_group=num_pages * config.cache.page_size,
        ),
        predictor=predictor,
        work_model=work_model,
    )
    intake = Intake(
        vocab_size=spec.vocab_size,
        max_positions=spec.max_positions,
        defaults=model.defaults,
        tokenizer=model.tokenizer,
        model=model.name,
    )
    log.info("%s, %s on %s, %s attention", model.name, dtype, device, backend.name)
    log.info("%s", describe_cache(num_pages, config.cache.page_size, spec, dtype))
    return Engine(scheduler, executor, intake, on_step=on_step)


def check_mesh(mesh: MeshConfig) -> None:
    """Refuse a mesh that one process cannot hold.

    Raises:
        ValueError: with the degrees and the number of processes.
    """
    if mesh.world_size != 1:
        raise ValueError(
            "mesh.pp x mesh.kvp x mesh.tp must equal the number of processes, 1, got "
            f"{mesh.pp} x {mesh.kvp} x {mesh.tp} = {mesh.world_size}; set all three to 1"
        )


def choose_device(name: str) -> torch.device:
    """The device by name; ``"auto"`` is cuda where there is one, else cpu.

    Raises:
        ValueError: if the name is no device, or the device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}; use auto"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}; use auto")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device must be there, got {name!r} where torch sees {count} GPUs; use device=cpu"
        )
    return device


def find_model(name: str) -> tuple[ModelSpec, Path | None]:
    """The spec of a checkpoint directory, of "needle" (written if need be) or of "bench"."""
    if name == "bench":
        return bench_spec(), None
    path = needle_path() if name == "needle" else Path(os.path.expanduser(name))
    return read_spec(path), path


def needle_path() -> Path:
    """Where the needle model lies; it is written at first use."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return write_needle(root / "mnemosyne" / "needle")


def load_model(
    name: str,
    spec: ModelSpec,
    path: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> Model:
    """Weights, tokenizer and defaults of a model that ``find_model`` found."""
    if path is None:
        decoder = Decoder(spec, dtype=dtype, device=device)
        init_random(decoder, BENCH_SEED)
        return Model(name, spec, decoder, None, GenerationDefaults())
    tokenizer = Tokenizer.from_dir(path)
    defaults = GenerationDefaults.from_dir(path)
    decoder = Decoder(spec, dtype=dtype, device="meta")
    load_weights(decoder, path, device=device, progress=progress)
    return Model(name, spec, decoder, tokenizer, defaults)


def count_pages(
    config: CacheConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> int:
    """Pages that the memory budget holds, beside weights that are not loaded yet.

    Raises:
        ValueError: if it is less than one page, or more than what the weights leave.
    """
    free_bytes = max(0, free_memory(device) - _weight_bytes(spec, dtype))
    token_bytes = _token_bytes(spec, dtype)
    if config.max_tokens is not None:
        num_tokens, asked = int(config.max_tokens), f"cache.max_tokens={config.max_tokens}"
        num_pages = pages_for(num_tokens, config.page_size) if num_tokens else 0
    else:
        budget = int(free_bytes * config.memory_share)
        num_tokens, asked = budget // token_bytes, f"cache.memory_share={config.memory_share}"
        num_pages = num_tokens // config.page_size
    if num_pages < 1:
        raise ValueError(
            f"{asked} must hold at least one page of {config.page_size} tokens "
            f"({config.page_size * token_bytes:,} bytes), got room for {num_tokens} tokens; "
            "raise it or lower cache.page_size"
        )
    pool_bytes = num_pages * config.page_size * token_bytes
    if pool_bytes > free_bytes:
        raise ValueError(
            f"{asked} must fit the memory of {device} that the weights leave, "
            f"{free_bytes / 2**30:.1f} GiB, got {pool_bytes / 2**30:.1f} GiB; lower it"
        )
    return num_pages


def _weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    decoder = Decoder(spec, dtype=dtype, device="meta")
    return sum(parameter.numel() for parameter in decoder.parameters()) * dtype.itemsize


def describe_cache(num_pages: int, page_size: int, spec: ModelSpec, dtype: torch.dtype) -> str:
    """One line: tokens that fit, their memory, and how many requests of which length that is."""
    num_tokens = num_pages * page_size
    gib = num_tokens * _token_bytes(spec, dtype) / 2**30
    lengths = [(2**20, "1M"), (2**17, "128K"), (2**13, "8K"), (2**10, "1K")]
    parts = [f"{num_tokens // n:,} of {name}" for n, name in lengths if num_tokens >= n]
    requests = " or ".join(parts) if parts else f"one of {num_tokens}"
    return f"KV cache: {num_tokens:,} tokens in {gib:.2f} GiB; requests that fit: {requests}"


def _token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    return bytes_per_token(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
    )


def _fit(
    predictor: LinearPredictor,
    executor: Executor,
    work_model: WorkModel,
    config: EngineConfig,
    spec: ModelSpec,
    num_pages: int,
) -> None:
    limits = Limits(
        num_pages=num_pages,
        page_size=config.cache.page_size,
        max_positions=spec.max_positions,
        vocab_size=spec.vocab_size,
        step_s=2 * config.schedule.target_tbt,
    )
    started_s = time.perf_counter()
    samples = calibrate(executor, work_model, limits, clock=time.perf_counter)
    if samples:
        predictor.fit(samples)
    seconds = time.perf_counter() - started_s
    log.info("step times fitted from %d steps in %.1f s", len(samples), seconds)
