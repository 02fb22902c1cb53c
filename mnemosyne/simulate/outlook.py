"""TTFT and TBT of one layout for requests of one length, worked out without running a workload."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np

from mnemosyne.cache.layout import pages_for
from mnemosyne.cache.table import PageTable
from mnemosyne.request import SamplingParams
from mnemosyne.schedule.chunking import CHUNK_MULTIPLE
from mnemosyne.schedule.plan import Admission, Chunk, Plan
from mnemosyne.simulate.cluster import SimulatedCluster
from mnemosyne.simulate.cost import StepCost

INTERVALS = 16  # of the context, between whose ends prefill is interpolated
NO_IDS = np.empty(0, dtype=np.int64)
GREEDY = SamplingParams(temperature=0.0)


class Outlook:
    """The times of a request of ``context`` tokens beside decodes of the same length.

    Its cache lies evenly on all groups. Steps hold ``decodes / pp`` decodes each, as the scheduler
    deals them out, and the largest chunk that keeps a whole pass within the budget.

    Args:
        cost: of a step in this layout.
        context: tokens of every prompt.
        page_size: tokens per page; shards are whole pages.
        max_chunk: largest chunk, tokens.
    """

    def __init__(
        self, cost: StepCost, *, context: int, page_size: int = 128, max_chunk: int = 8192
    ) -> None:
        mesh = cost.mesh
        self.cost = cost
        self.context = context
        self.max_chunk = max_chunk
        self.shard_tokens = pages_for(-(-context // mesh.kvp), page_size) * page_size
        parts = [(group, NO_IDS) for group in range(mesh.kvp)]
        tables = ((0, PageTable.spread(parts, self.shard_tokens)),)
        admission = Admission(
            request_id=0,
            prompt_ids=NO_IDS,
            params=GREEDY,
            seed=0,
            end_token_ids=(),
        )
        self._cluster = SimulatedCluster(cost)
        # One request stands for all: their shards lie alike.
        self._cluster.submit(Plan(index=0, chunks=(), admitted=(admission,), tables=tables))

    def tbt_s(self, decodes: int, chunk: int = 0) -> float:
        """Time between tokens of ``decodes`` requests at the end of their context.

        Args:
            decodes: requests that decode.
            chunk: tokens of the prompt, at its end, that ride along in every step.
        """
        stages, hops = self._pass(decodes, self._last_start(chunk), chunk)
        # each decode is in one of the steps in flight, and comes round when its step is through
        return max(sum(stages) + hops, len(stages) * max(stages))

    def ttft_s(self, decodes: int, budget_s: float, *, limit_s: float = inf) -> float:
        """Time of a prefill whose chunks leave every pass within the budget, decodes included.

        Args:
            decodes: requests that decode.
            budget_s: of a pass.
            limit_s: once the time is sure to be longer, some longer time than this is returned.
        """
        last = self._last_start(CHUNK_MULTIPLE)
        starts = [
            last * i // INTERVALS // CHUNK_MULTIPLE * CHUNK_MULTIPLE for i in range(INTERVALS)
        ]
        per_token = []
        for start in (*starts, last):
            chunk = self.chunk_at(start, decodes, budget_s)
            stages, hops = self._pass(decodes, start, chunk)
            per_token.append(max(stages) / chunk)
            least = (sum(per_token) - (per_token[0] + per_token[-1]) / 2) / INTERVALS
            if least * self.context > limit_s:
                return least * self.context
        fill_s = sum(stages) + hops - max(stages)
        return least * self.context + fill_s

    def chunk_at(self, start: int, decodes: int, budget_s: float) -> int:
        """The largest chunk from position ``start`` whose pass stays within the budget.

        At least ``CHUNK_MULTIPLE``: a prompt always advances.
        """
        most = min(self.max_chunk, self.context, self.shard_tokens)
        low, high = 1, max(1, most // CHUNK_MULTIPLE)
        while low < high:
            middle = (low + high + 1) // 2
            stages, hops = self._pass(decodes, start, middle * CHUNK_MULTIPLE)
            if sum(stages) + hops <= budget_s:
                low = middle
            else:
                high = middle - 1
        return low * CHUNK_MULTIPLE

    def _last_start(self, chunk: int) -> int:
        """Where the last chunk of a prompt begins, in whole multiples as the chunk rule cuts."""
        return max(0, self.context - chunk) // CHUNK_MULTIPLE * CHUNK_MULTIPLE

    def _pass(self, decodes: int, start: int, chunk: int) -> tuple[Sequence[float], float]:
        """Times of all stages for a step, and of all messages between them."""
        pp = self.cost.mesh.pp
        decode = Chunk(0, self.context - 1, 1, samples=True, token_id=0)
        chunks = [decode] * -(-decodes // pp)
        if chunk:
            # no chunk crosses into another shard; the few cut short for it weigh little
            end = min(self.context, (start // self.shard_tokens + 1) * self.shard_tokens)
            chunks.append(Chunk(0, max(0, min(start, end - chunk)), chunk, samples=False))
        loads = self._cluster.loads(Plan(index=0, chunks=tuple(chunks)))
        hops = (pp - 1) * self.cost.hop_s(loads) if pp > 1 else 0.0
        return self.cost.stage_s(loads), hops
