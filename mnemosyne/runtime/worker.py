"""One rank's part of every step: its sequences, its pages, its layers, its rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from mnemosyne.attention.handing import Handing
from mnemosyne.attention.kvp import StartExchange, start_exchange
from mnemosyne.attention.segments import AttentionBackend
from mnemosyne.cache.pages import PagePool
from mnemosyne.cache.table import PageTable
from mnemosyne.operators import Operators
from mnemosyne.parallel.feed_forward import feed_forward_over
from mnemosyne.parallel.mesh import Mesh
from mnemosyne.parallel.pipeline import Pipeline
from mnemosyne.parallel.trace import Trace
from mnemosyne.request import Logprobs, Sampled
from mnemosyne.runtime.graphs import DecodeGraphs
from mnemosyne.runtime.inputs import PlacedChunk, StepInputs, build_inputs, count_rows
from mnemosyne.runtime.leaves import RankLeaves
from mnemosyne.runtime.rings import drop_rings, enter_rings
from mnemosyne.runtime.sampler import sample, token_logprobs
from mnemosyne.runtime.sequences import SequenceState
from mnemosyne.runtime.step import LayerShape, Model, PagedAttention
from mnemosyne.schedule.plan import Chunk, Plan, StepResult
from mnemosyne.step_context import StepContext

LOGPROB_ROWS = 256  # rows of prompt logits that exist at a time


class Worker:
    """Runs the local part of steps on one device.

    Args:
        model: the local stage of the decoder, weights loaded.
        layers: windows of its layers and the scale of its scores.
        pool: the KV cache.
        backend: how attention is computed.
        operators: those of the model.
        device: where inputs go.
        mesh: this rank's place.
        pipeline: the links to the stages before and after, if there are any.
        trace: records what this rank does, if anybody wants to know.
        graphs: replay the steps that they hold; the model runs the others.
        exchange: brings the partials of rows together that several groups compute.
        leaves: the way to the disk, if there is one.
    """

    def __init__(
        self,
        model: Model,
        layers: LayerShape,
        *,
        pool: PagePool,
        backend: AttentionBackend,
        operators: Operators,
        device: torch.device,
        mesh: Mesh,
        pipeline: Pipeline | None = None,
        trace: Trace | None = None,
        graphs: DecodeGraphs | None = None,
        exchange: StartExchange = start_exchange,
        leaves: RankLeaves | None = None,
    ) -> None:
        self._model = model
        self._layers = layers
        self._pool = pool
        self._backend = backend
        self._operators = operators
        self._device = device
        self._mesh = mesh
        self._pipeline = pipeline
        self._trace = trace
        self._graphs = graphs
        self._exchange = exchange
        self._leaves = leaves
        self._sequences: dict[int, SequenceState] = {}
        self._expected: deque[Plan] = deque()  # announced, and not run yet
        self._tables: dict[int, PageTable] = {}  # as of the last of them
        self._followed: int | None = None  # the last step whose changes were followed to the end

    @property
    def pool(self) -> PagePool:
        """The KV cache of this rank."""
        return self._pool

    def has_followed(self, plan: Plan) -> bool:
        """Return whether all that a step changes is done, be its rows computed or not."""
        return self._followed == plan.index

    def expect(self, plan: Plan) -> None:
        """Take notice of a coming step, so that its input arrives while another is computed.

        Optional, and done once: ``run`` does it for a step that was not announced. Steps are run
        in the order in which they were announced.
        """
        if any(known is plan for known in self._expected):
            return
        self._expected.append(plan)
        if self._pipeline is None:
            return
        # Not the sequences: an id may go and come again between the step at hand and this one.
        for request_id in plan.released:
            self._tables.pop(request_id, None)
        self._tables.update(plan.tables)
        if plan.chunks:
            self._pipeline.expect(count_rows(plan, self._tables, self._mesh.kvp.index))

    def run(self, plan: Plan) -> StepResult | None:
        """Run the local part of a step.

        Returns:
            What the step gave, on the one rank of each group that reports it (the first of tp on
            the last stage); None on the others, but for what each restored.
        """
        if self._trace is not None:
            here = (c for c in plan.chunks if c.group in (None, self._mesh.kvp.index))
            self._trace.begin(plan.index, ((c.request_id, c.start, c.num_tokens) for c in here))
        self.expect(plan)
        announced = self._expected.popleft()
        assert announced is plan, f"step {announced.index} was announced before step {plan.index}"
        if self._leaves is not None:
            self._leaves.save_all(plan)  # before pages change hands
        self._apply(plan)
        restored = self._leaves.follow(plan, self._sequences) if self._leaves is not None else {}
        self._followed = plan.index
        result = StepResult(plan.index)
        if plan.chunks:
            hidden_TE, inputs, is_finite_T, came_broken = self._forward(plan)
            if hidden_TE is not None:
                prompt_logprobs = self._prompt_logprobs(inputs, hidden_TE)
                result = StepResult(plan.index, self._sample(inputs, hidden_TE), prompt_logprobs)
            if is_finite_T is None:
                broken = _failed(inputs, result)
            else:
                broken = _not_finite(inputs, is_finite_T)
            places = [(chunk.request_id, chunk.start) for chunk in broken] + came_broken
            for request_id, start in places:
                self._sequences[request_id].note_broken(start)
            if places:
                self._pool.clear_passing()
            result = replace(result, broken=tuple(request_id for request_id, _ in places))
        is_last_stage = self._mesh.pp.index == self._mesh.pp.degree - 1
        if is_last_stage and self._mesh.tp.index == 0:
            return replace(result, restored=restored) if restored else result
        return StepResult(plan.index, restored=restored) if plan.restores else None

    @torch.inference_mode()
    def _forward(
        self, plan: Plan
    ) -> tuple[Tensor | None, StepInputs, Tensor | None, list[tuple[int, int]]]:
        """Hidden states of the last stage, and which rows are finite; a GPU may still be at it.

        None if logits will tell: those of a row that is not finite are not. Then the slices that
        other groups handed over broken, by request and first position.
        """
        inputs = build_inputs(
            plan,
            self._sequences,
            group=self._mesh.kvp.index,
            num_groups=self._mesh.kvp.degree,
            is_wide=self._mesh.is_wide,
            page_size=self._pool.page_size,
            padding_slot=self._pool.padding_slot,
            page_ids=self._pool.ids,
            device=self._device,
            pool=self._pool,
        )
        handing = self._handing(inputs)
        forward, is_finite = self._forward_pass(inputs, handing), list[Tensor]()
        is_here = self._mesh.pp.degree == self._mesh.kvp.degree == 1
        logits_tell = is_here and plan.chunks[-1].is_decode  # decodes come first, so all of it is

        def stage(x: Tensor) -> Tensor:
            hidden_TE = forward(x)
            if handing is not None:
                handing.finish()
            if not logits_tell:
                sum_T = hidden_TE.sum(-1, dtype=torch.float32)
                is_finite.append(sum_T - sum_T == 0)  # nan otherwise; isfinite is four operators
            return hidden_TE

        last_TE: Tensor | None
        if self._pipeline is None:
            with self._trace.span("compute") if self._trace else nullcontext():
                last_TE = stage(inputs.token_ids_T)
        else:
            num_rows = len(inputs.token_ids_T)
            last_TE = self._pipeline.run(stage, num_rows, inputs.token_ids_T, step=plan.index)
        came_broken = [(h.request_id, h.start) for h in handing.broken()] if handing else []
        return last_TE, inputs, is_finite[0] if is_finite else None, came_broken

    def _handing(self, inputs: StepInputs) -> Handing | None:
        if inputs.handed is None:
            return None
        pools = list(zip(self._pool.k, self._pool.v, strict=True))
        return Handing(inputs.handed, pools, self._mesh.kvp)

    def _forward_pass(
        self, inputs: StepInputs, handing: Handing | None
    ) -> Callable[[Tensor], Tensor]:
        """The forward pass of a step, its tables ready before its input arrives."""
        graphs = self._graphs
        if graphs is not None and graphs.holds(inputs):
            return lambda x: graphs.run(inputs)
        attend = PagedAttention(
            self._pool,
            self._backend,
            self._operators,
            inputs,
            layers=self._layers,
            kvp=self._mesh.kvp,
            exchange=self._exchange,
            handing=handing,
        )
        context = StepContext(attend, feed_forward_over(inputs.wide, self._mesh.kvp))
        return lambda x: self._model(x, inputs.positions_T, context)

    def close(self) -> None:
        """Wait until the next stage has taken everything; call it after the last step."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def _apply(self, plan: Plan) -> None:
        """Follow the changes that the plan carries; released pages may be handed out anew."""
        group = self._mesh.kvp.index
        for request_id in plan.released:
            gone = self._sequences.pop(request_id, None)
            self._pool.ids.drop(request_id)
            drop_rings(self._pool, request_id)
            if gone is not None and gone.broken_from is not None:
                self._clear(gone.table, gone.broken_from)
        for admission in plan.admitted:
            self._sequences[admission.request_id] = SequenceState.start(admission)
        for request_id, table in plan.tables:
            sequence = self._sequences[request_id]
            is_dismissed = len(table.pages_on(group)) < len(sequence.table.pages_on(group))
            if is_dismissed and sequence.broken_from is not None:
                self._clear(sequence.table, sequence.broken_from)
            sequence.table = table
            self._pool.ids.enter(request_id, table.pages_on(group))
            enter_rings(self._pool, request_id, table.rings_on(group))
        for copy in plan.copies:
            if copy.group == group:
                self._pool.copy(copy.sources, copy.targets)
        for chunk in plan.chunks:
            if chunk.token_id is not None:
                self._sequences[chunk.request_id].append(chunk.token_id, chunk.start)

    def _clear(self, table: PageTable, broken_from: int) -> None:
        """Zero what a broken request left behind, before the pages are handed out anew.

        A backend may read slots that a row does not see, and 0 times nan is nan. Pages before the
        first one that broke are whole; others may read them.
        """
        for extent in table.lanes:
            if extent.group == self._mesh.kvp.index:
                first = max(0, broken_from - extent.start) // self._pool.page_size
                self._pool.clear(extent.pages[first:])
        for ring in table.rings_on(self._mesh.kvp.index):
            self._pool.clear(ring.ravel())

    def _reports(self, placed: PlacedChunk) -> bool:
        """Return whether this group speaks for a chunk: the first of several does."""
        table = self._sequences[placed.chunk.request_id].table
        return table.lane(placed.chunk.group).reporter == self._mesh.kvp.index

    @torch.inference_mode()
    def _sample(self, inputs: StepInputs, hidden_TE: Tensor) -> dict[int, Sampled]:
        rows, request_ids = [], []
        is_alone = self._mesh.kvp.degree == 1
        for placed in inputs.chunks:
            chunk, first_row = placed
            if chunk.samples and (is_alone or self._reports(placed)):
                rows.append(first_row + chunk.num_tokens - 1)
                request_ids.append(chunk.request_id)
        if not rows:
            return {}
        sequences = [self._sequences[request_id] for request_id in request_ids]
        if len(rows) < len(hidden_TE):
            index_B = torch.tensor(rows, dtype=torch.int64, device=hidden_TE.device)
            hidden_TE = hidden_TE[index_B]
        logits_BV = self._model.logits(hidden_TE)
        results = sample(logits_BV, [sequence.sampler for sequence in sequences])
        return dict(zip(request_ids, results, strict=True))

    def _prompt_logprobs(
        self, inputs: StepInputs, hidden_TE: Tensor
    ) -> dict[tuple[int, int], list[Logprobs]]:
        found = {}
        for placed in inputs.chunks:
            if placed.chunk.token_id is not None:
                continue
            request_id = placed.chunk.request_id
            asked = self._sequences[request_id].prompt_logprobs is not None
            if asked and self._reports(placed):
                found[request_id, placed.chunk.start] = self._chunk_logprobs(placed, hidden_TE)
        return found

    @torch.inference_mode()
    def _chunk_logprobs(self, placed: PlacedChunk, hidden_TE: Tensor) -> list[Logprobs]:
        """Log-probabilities of the prompt tokens that follow the rows of a chunk."""
        chunk = placed.chunk
        sequence = self._sequences[chunk.request_id]
        assert sequence.prompt_logprobs is not None
        stop = min(chunk.stop, sequence.num_prompt_tokens - 1)
        found: list[Logprobs] = []
        for start in range(chunk.start, stop, LOGPROB_ROWS):
            end = min(start + LOGPROB_ROWS, stop)
            row = placed.first_row + start - chunk.start
            logits_BV = self._model.logits(hidden_TE[row : row + end - start])
            targets = torch.from_numpy(sequence.tokens[start + 1 : end + 1])
            found += token_logprobs(
                logits_BV, targets.to(logits_BV.device), sequence.prompt_logprobs
            )
        return found


def _failed(inputs: StepInputs, result: StepResult) -> list[Chunk]:
    """The decodes whose logits were not finite: what they hold may not be."""
    sampled = result.sampled
    return [c for c, _ in inputs.chunks if c.request_id in sampled and sampled[c.request_id].error]


def _not_finite(inputs: StepInputs, is_finite_T: Tensor) -> list[Chunk]:
    """The chunks that may have stored keys or values that are not finite.

    Every row sees its own key and value in every layer, so its hidden state tells. Logits of a
    prefill would not: a request that is cancelled before its end never has any.
    """
    is_finite_T = is_finite_T.cpu()
    if is_finite_T.all():
        return []
    return [
        placed.chunk
        for placed in inputs.chunks
        if not is_finite_T[placed.first_row : placed.last_row + 1].all()
    ]
