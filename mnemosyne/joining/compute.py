"""The choice of attention, operators and compiler or tape on this rank, made once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from mnemosyne.attention import AttentionBackend, choose_backend
from mnemosyne.attention.kvp import StartExchange
from mnemosyne.attention.segments import RecordableBackend
from mnemosyne.cache.pages import PagePool
from mnemosyne.config import EngineConfig
from mnemosyne.operators import Operators, choose_operators
from mnemosyne.runtime.compile import CompiledModel
from mnemosyne.runtime.graphs import DecodeGraphs, record_decodes
from mnemosyne.runtime.step import LayeredModel, LayerShape, Model
from mnemosyne.schedule.plan import Executor
from mnemosyne.shape import ModelShape

log = logging.getLogger(__name__)

Part = TypeVar("Part")


def as_it_is(part: Any) -> Any:
    """Puts nothing around a part."""
    return part


@dataclass(frozen=True, kw_only=True, slots=True)
class Wraps:
    """Wrappers around the parts of an engine, such as a bench's clocks; each keeps its contract."""

    operators: Callable[[Operators], Operators] = as_it_is
    backend: Callable[[AttentionBackend], AttentionBackend] = as_it_is
    model: Callable[[Model], Model] = as_it_is
    executor: Callable[[Executor], Executor] = as_it_is
    exchange: Callable[[StartExchange], StartExchange] = as_it_is


AS_THEY_ARE = Wraps()


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The parts that compute a step."""

    device: torch.device
    dtype: torch.dtype
    backend: AttentionBackend
    operators: Operators
    compiles: bool  # all but attention is compiled before the first request
    records: bool  # steps of decodes alone are recorded then, and repeated

    def model(self, decoder: LayeredModel, progress: Callable[[int, int], None] | None) -> Model:
        """The decoder, or what is compiled of it; every rank calls it.

        Args:
            decoder: weights loaded.
            progress: called while it is compiled.
        """
        if not self.compiles:
            return decoder
        started_s = time.perf_counter()
        model = CompiledModel(decoder, self.device)
        model.warm_up(progress)
        log.info("compiled in %.1f s", time.perf_counter() - started_s)
        return model

    def graphs(self, model: Model, layers: LayerShape, pool: PagePool) -> DecodeGraphs | None:
        """The steps that are repeated, if any are."""
        if not self.records:
            return None
        backend = cast(RecordableBackend, self.backend)
        return record_decodes(model, layers, pool, backend, self.operators)


def choose_compute(
    config: EngineConfig,
    *,
    device: torch.device,
    local: ModelShape,
    wraps: Wraps,
    is_recordable: bool = True,
    is_static: bool = True,
) -> Compute:
    """Choose what the config names; a choice that cannot run is refused, never replaced.

    Args:
        config: all choices.
        device: of this rank.
        local: this rank's part of the model, in the dtype that it computes in.
        wraps: what to put around backend and operators.
        is_recordable: whether the operators are all that a tape has to repeat.
        is_static: whether each step of as many rows launches the same.

    Raises:
        ValueError: if attention, operators or what is compiled cannot be as asked for.
    """
    dtype = getattr(torch, local.dtype)
    backend = choose_backend(config.attention, device=device, dtype=dtype, head_dim=local.head_dim)
    widths = {"width": local.width, "head_dim": local.head_dim, "mlp_width": local.mlp_width}
    operators = choose_operators(config.operators, device=device, dtype=dtype, widths=widths)
    compiles, records = _how_steps_run(
        config, device, backend, operators, is_recordable=is_recordable, is_static=is_static
    )
    return Compute(
        device=device,
        dtype=dtype,
        backend=wraps.backend(backend),
        operators=wraps.operators(operators),
        compiles=compiles,
        records=records,
    )


def _how_steps_run(
    config: EngineConfig,
    device: torch.device,
    backend: AttentionBackend,
    operators: Operators,
    *,
    is_recordable: bool,
    is_static: bool,
) -> tuple[bool, bool]:
    """Return whether all but attention is compiled, and whether decodes are recorded."""
    num_ranks = config.mesh.world_size
    is_gpu, can_record = device.type == "cuda", backend.can_record and num_ranks == 1
    if not is_gpu:
        can_record &= operators.can_record and is_recordable
    can_record &= is_static
    if config.compile == "none":
        return False, False
    if config.compile == "auto":
        return False, can_record and not is_gpu
    if is_gpu and num_ranks == 1 and not backend.can_record:
        raise ValueError(
            f"attention must be triton for compile=step on a GPU, got {backend.name}; "
            "write attention=triton, or compile=none"
        )
    if is_gpu or not can_record:
        if not operators.can_compile:
            raise ValueError(
                f"operators must be torch for compile=step with attention={backend.name} on "
                f"{num_ranks} rank{'s' * (num_ranks > 1)}, got {operators.name}; write "
                "operators=torch, or compile=none"
            )
        return True, can_record
    return False, True
