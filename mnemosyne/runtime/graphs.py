"""Steps of decodes alone as graphs: one launch replays the whole forward pass.

A graph repeats the kernels of one step at the addresses that it saw. So the inputs of a step are
copied to tensors that stay in place, and attention must launch alike whatever the lengths are.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from mnemosyne.attention.chunked import Chunked, prepare
from mnemosyne.attention.segments import AttentionBackend, AttentionBatch, RecordableBackend
from mnemosyne.cache.pages import PagePool
from mnemosyne.kernels.cpu.tape import Memory, Tape
from mnemosyne.operators import Operators
from mnemosyne.parallel.feed_forward import own_rows
from mnemosyne.parallel.mesh import Axis
from mnemosyne.runtime.inputs import StepInputs, bucket_size
from mnemosyne.runtime.rings import TrackRows
from mnemosyne.runtime.step import LayerShape, Model, PagedAttention, sights
from mnemosyne.step_context import StepContext

log = logging.getLogger(__name__)

MOST_ROWS = 64  # of a step that is replayed; larger ones hide their launches behind their work
GRAPH_ROWS = tuple(sorted({bucket_size(n) for n in range(1, MOST_ROWS + 1)}))

TAPE_BYTES = 1 << 28  # of memory for what steps compute on the way; what is not used takes none


class Graph(Protocol):
    """Something that records what is launched, and launches it again."""

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """Record what ``run`` launches; the tensor that each replay overwrites."""

    def replay(self) -> None:
        """Launch it again."""


class CudaGraph:
    """A ``torch.cuda.CUDAGraph``.

    Args:
        device: where the work runs.
        memory: from ``torch.cuda.graph_pool_handle``: where what is computed on the way lies.
            Graphs that never run at the same time may share it.
    """

    def __init__(self, device: torch.device, memory: Any) -> None:
        self._device = device
        self._memory = memory
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        """See ``Graph``. What compiles or allocates once does so in a run before."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()
            torch.cuda.current_stream().wait_stream(stream)
            # On torch's own stream: memory is shared among captures of one stream alone.
            with torch.cuda.graph(self._graph, pool=self._memory):
                return run()

    def replay(self) -> None:
        """See ``Graph``."""
        self._graph.replay()


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """A graph and the tensors that it reads and writes."""

    graph: Graph
    backends: Sequence[AttentionBackend]  # of each track: prepare refills the tables it reads
    inputs: StepInputs
    hidden_TE: Tensor


class DecodeGraphs:
    """The forward pass of decode steps, captured for a few numbers of rows.

    Args:
        model: the decoder, weights loaded.
        layers: windows of its layers and the scale of their scores.
        pool: the KV cache.
        operators: those of the model.
        backend_for: from the number of rows and the page ids of a track, a backend whose
            ``prepare`` refills tables that stay in place and whose ``attend`` launches the same
            kernels whatever they hold.
        new_graph: makes a graph.
        rows: numbers of rows, padding included.
    """

    def __init__(
        self,
        model: Model,
        layers: LayerShape,
        pool: PagePool,
        *,
        operators: Operators,
        backend_for: Callable[[int, Tensor], AttentionBackend],
        new_graph: Callable[[], Graph],
        rows: Sequence[int] = GRAPH_ROWS,
    ) -> None:
        is_chunked = any(isinstance(reach, Chunked) for reach in layers.windows)
        assert not is_chunked, "the rows of chunks would be written over those of full layers"
        self._model = model
        self._layers = layers
        self._pool = pool
        self._operators = operators
        self._backend_for = backend_for
        self._new_graph = new_graph
        # The largest first: the others fit in the memory that it leaves.
        self._captured = {n: self._capture(n) for n in sorted(rows, reverse=True)}

    def holds(self, inputs: StepInputs) -> bool:
        """Return whether a graph was captured for such a step."""
        alone = inputs.shared is None and inputs.wide is None and inputs.handed is None
        decodes = all(segment.num_rows == 1 for segment in inputs.batch.segments)
        return alone and decodes and inputs.batch.num_rows in self._captured

    def run(self, inputs: StepInputs) -> Tensor:
        """Hidden states ``[T, E]`` of a step that is held, until the next one overwrites them."""
        captured = self._captured[inputs.batch.num_rows]
        captured.inputs.token_ids_T.copy_(inputs.token_ids_T)
        captured.inputs.positions_T.copy_(inputs.positions_T)
        for fixed, rows in zip(captured.inputs.tracks, inputs.tracks, strict=True):
            fixed.slots_T.copy_(rows.slots_T)
        for track, reach in sights(self._pool, self._layers):
            batch, backend = inputs.tracks[track].batch, captured.backends[track]
            prepare(backend, batch, reach, inputs.slots_T.device)
        captured.graph.replay()
        return captured.hidden_TE

    @torch.inference_mode()
    def _capture(self, num_rows: int) -> _Captured:
        """Capture a step of padding rows alone."""
        graph, pool = self._new_graph(), self._pool
        device = pool.k[0].device
        backends = [self._backend_for(num_rows, page_ids) for page_ids in pool.track_ids]
        rings = tuple([self._padding(num_rows, page_ids) for page_ids in pool.ring_tracks])
        inputs = StepInputs(
            token_ids_T=torch.zeros(num_rows, dtype=torch.int64, device=device),
            positions_T=torch.zeros(num_rows, dtype=torch.int64, device=device),
            slots_T=torch.full((num_rows,), pool.padding_slot, device=device),
            batch=AttentionBatch((), num_rows, pool.page_size, pool.ids.tensor),
            chunks=(),
            rings=rings,
            keeps=pool.kinds.keeps,
        )
        attend = PagedAttention(
            *(pool, backends[0], self._operators, inputs),
            layers=self._layers,
            kvp=Axis("kvp"),
            backends=backends,
        )
        context = StepContext(attend, own_rows)
        hidden_TE = graph.capture(
            lambda: self._model(inputs.token_ids_T, inputs.positions_T, context)
        )
        return _Captured(graph, backends, inputs, hidden_TE)

    def _padding(self, num_rows: int, page_ids: Tensor) -> TrackRows:
        """Padding rows alone, in a track of layers that forget."""
        pool = self._pool
        slots_T = torch.full((num_rows,), pool.padding_slot, device=page_ids.device)
        return TrackRows(slots_T, AttentionBatch((), num_rows, pool.page_size, page_ids))


def record_decodes(
    model: Model,
    layers: LayerShape,
    pool: PagePool,
    backend: RecordableBackend,
    operators: Operators,
    *,
    new_graph: Callable[[], Graph] | None = None,
    rows: Sequence[int] = GRAPH_ROWS,
) -> DecodeGraphs:
    """Record decode steps where the pool is; whatever compiles has done so before.

    Args:
        model: as for ``DecodeGraphs``, like all that is not named here. On the CPU the decoder
            itself: what a compiler made of it could not be recorded.
        layers: windows and scale.
        pool: the KV cache.
        backend: the one that runs other steps.
        operators: those of the model.
        new_graph: makes a graph; unset: what the device has, sharing memory.
        rows: numbers of rows.
    """
    started_s = time.perf_counter()
    graphs = DecodeGraphs(
        model,
        layers,
        pool,
        operators=operators,
        backend_for=lambda num_rows, page_ids: backend.fixed(
            pool.k[0], num_rows=num_rows, page_size=pool.page_size, page_ids=page_ids
        ),
        new_graph=new_graph or graphs_on(pool.k[0].device),
        rows=rows,
    )
    log.info("decode steps recorded in %.1f s", time.perf_counter() - started_s)
    return graphs


def graphs_on(device: torch.device) -> Callable[[], Graph]:
    """Makes graphs of a device that share their memory: one runs at a time."""
    if device.type == "cpu":
        return partial(Tape, Memory(TAPE_BYTES))
    with torch.cuda.device(device):
        return partial(CudaGraph, device, torch.cuda.graph_pool_handle())
