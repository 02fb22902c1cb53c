"""An executor that runs no model: it advances a clock by the cost of each step."""

from __future__ import annotations

from collections import deque

from mnemosyne.cache.table import PageTable
from mnemosyne.request import Sampled
from mnemosyne.schedule.plan import Chunk, Plan, StepResult, handovers
from mnemosyne.schedule.work import WorkModel
from mnemosyne.simulate.cost import GroupLoad, StepCost

TOKEN = Sampled(token_id=0)  # every token that is sampled here


class SimulatedCluster:
    """Stages of a pipeline on a clock; an ``Executor`` for engine and scheduler.

    As on a mesh, submitting returns when the first stage is done with a step, and collecting when
    the last one is. A stage starts a step when it has it and is done with the one before; sending
    a step on takes time, during which the sender computes the next one.

    Args:
        cost: of a step.
    """

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.depth = len(cost.stages)
        self.now_s = 0.0
        self._idle_s = [0.0] * self.depth  # when each stage is done with all it has
        self._in_flight: deque[tuple[float, StepResult]] = deque()
        self._tables: dict[int, PageTable] = {}
        windows = cost.shape.windows
        self._work_model = WorkModel(windows) if any(w is not None for w in windows) else None

    def clock(self) -> float:
        """Seconds of simulated time."""
        return self.now_s

    def wait_until(self, time_s: float) -> None:
        """Let time pass, if that moment is still to come."""
        self.now_s = max(self.now_s, time_s)

    def submit(self, plan: Plan) -> None:
        """Start a step; it is over on the first stage when this returns."""
        for request_id in plan.released:
            self._tables.pop(request_id, None)
        self._tables.update(plan.tables)
        finished_s = self.now_s
        if plan.chunks:
            loads = self.loads(plan)
            ready_s, hop_s = self.now_s, 0.0
            for stage, seconds in enumerate(self.cost.stage_s(loads)):
                finished_s = max(ready_s, self._idle_s[stage]) + seconds
                self._idle_s[stage] = finished_s
                if stage == 0:
                    hop_s = self.cost.hop_s(loads) if self.depth > 1 else 0.0
                ready_s = finished_s + hop_s
            self.wait_until(self._idle_s[0])
        sampled = {chunk.request_id: TOKEN for chunk in plan.chunks if chunk.samples}
        self._in_flight.append((finished_s, StepResult(plan.index, sampled)))

    def collect(self) -> StepResult:
        """Wait for the oldest step in flight."""
        finished_s, result = self._in_flight.popleft()
        self.wait_until(finished_s)
        return result

    def loads(self, plan: Plan) -> list[GroupLoad]:
        """The load of each group in a step."""
        if self.cost.mesh.kvp == 1:
            load = GroupLoad()
            for chunk in plan.chunks:
                self._add(load, chunk, range(chunk.stop))
            load.owned_rows = load.rows
            return [load]
        loads = [GroupLoad() for _ in range(self.cost.mesh.kvp)]
        for chunk in plan.chunks:
            table = self._tables[chunk.request_id].lane(chunk.group)
            holding = table.holding(chunk.stop)
            loads[table.reporter].owned_rows += chunk.num_tokens
            for extent, positions in holding:
                load = loads[extent.group]
                self._add(load, chunk, positions)
                if len(holding) > 1:
                    load.shared_rows += chunk.num_tokens
        for chunk, receiver, is_needed in handovers(plan.chunks, self._tables.__getitem__):
            loads[receiver].handed_rows += is_needed * chunk.num_tokens
        return loads

    def _add(self, load: GroupLoad, chunk: Chunk, keys: range) -> None:
        """Count a chunk over the keys at positions ``keys``."""
        num_tokens, stop = chunk.num_tokens, chunk.start + chunk.num_tokens
        load.rows += num_tokens
        load.num_sampled += chunk.samples
        num_keys: float = keys.stop - keys.start
        # rows before the last see fewer of the chunk's own keys, if those are here
        pairs = num_tokens * num_keys
        if keys.stop == stop:
            pairs -= num_tokens * (num_tokens - 1) / 2
        if self._work_model is not None:
            pairs, num_keys = self._windowed(chunk, keys)
        if chunk.token_id is not None:
            load.decode_keys += pairs
        else:
            load.chunks.append((pairs, num_keys))

    def _windowed(self, chunk: Chunk, keys: range) -> tuple[float, float]:
        """Pairs and keys averaged over layers of which some see a window only."""
        assert self._work_model is not None
        work = self._work_model.chunk(
            chunk.start, chunk.num_tokens, samples=False, is_decode=False, keys=keys
        )
        windows = self.cost.shape.windows
        reach = [len(keys) if w is None else w + chunk.num_tokens - 1 for w in windows]
        return work.prefill_pairs, sum(min(len(keys), r) for r in reach) / len(windows)
