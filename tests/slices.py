"""An executor that cuts the chunks of plans into slices over all groups, as a test wants them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mnemosyne.cache.ledger import Ledger
from mnemosyne.cache.stock import Place
from mnemosyne.cache.table import Extent, PageTable
from mnemosyne.schedule.plan import Chunk, Executor, Plan, StepResult
from mnemosyne.serve.engine import Engine

Cut = Callable[[int, int], list[int] | None]  # tokens and lanes of a chunk to sizes; None: dismiss
FIRST_HOLDER = 10**9  # of copies, which the ledger notes for holders of their own


def even(num_tokens: int, num_lanes: int) -> list[int]:
    """Slices of one size; the home takes what is left."""
    size = num_tokens // num_lanes
    return [size] * (num_lanes - 1) + [num_tokens - size * (num_lanes - 1)]


def steep(num_tokens: int, num_lanes: int) -> list[int]:
    """Slices that grow shorter: each takes most of what is left."""
    sizes = []
    for _ in range(num_lanes - 1):
        sizes.append((num_tokens - sum(sizes)) * 2 // 3)
    return [*sizes, num_tokens - sum(sizes)]


def single(num_tokens: int, num_lanes: int) -> list[int]:
    """Slices of one token, and the rest at home."""
    ones = [int(num_tokens > index + 1) for index in range(num_lanes - 1)]
    return [*ones, num_tokens - sum(ones)]


def tail(num_tokens: int, num_lanes: int) -> list[int]:
    """One token at home; of the others the first has as good as all."""
    most = max(0, num_tokens - 1)
    return [most, *[0] * (num_lanes - 2), num_tokens - most]


class SlicedExecutor:
    """Lends pages on all groups to each prompt that starts, and cuts its chunks.

    Args:
        engine: its executor is replaced by this one.
        num_groups: degree of the kvp axis.

    Attributes:
        cut: how; None leaves new prompts alone.
    """

    def __init__(self, engine: Engine, num_groups: int) -> None:
        self.inner: Executor = engine._executor
        self.cut: Cut | None = None
        self.num_slices = 0
        self._ledger: Ledger = engine.scheduler.ledger
        self._num_groups = num_groups
        self._tables: dict[int, PageTable] = {}  # of prompts that are spread
        self._dismissed: dict[int, PageTable] = {}  # to be told to ranks, as they were
        self._plans: dict[int, Plan] = {}
        engine._executor = self

    @property
    def depth(self) -> int:
        return self.inner.depth

    def submit(self, plan: Plan) -> None:
        self._plans[plan.index] = plan
        for request_id in plan.released:
            self._free(self._tables.pop(request_id, None), request_id)
            self._free(self._dismissed.pop(request_id, None), request_id)
        tables = {i: PageTable(table.extents) for i, table in self._dismissed.items()}
        for request_id, table in self._dismissed.items():
            self._free(table, request_id)
        self._dismissed.clear()
        for request_id, table in plan.tables:
            tables[request_id] = self._lend(request_id, table)
        chunks = [piece for chunk in plan.chunks for piece in self._sliced(chunk, tables)]
        self.inner.submit(replace(plan, chunks=tuple(chunks), tables=tuple(tables.items())))

    def collect(self) -> StepResult:
        result = self.inner.collect()
        whole: dict[tuple[int, int], list] = {}
        for chunk in self._plans.pop(result.index).chunks:
            parts = [
                found
                for (request_id, start), found in sorted(result.prompt_logprobs.items())
                if request_id == chunk.request_id and chunk.start <= start < chunk.stop
            ]
            whole[chunk.request_id, chunk.start] = [entry for part in parts for entry in part]
        return replace(result, prompt_logprobs=whole)

    def _lend(self, request_id: int, table: PageTable) -> PageTable:
        if self.cut is None or len(table.extents) > 1:
            return table
        (home,), lent = table.extents, []
        num_tokens = len(home.pages) * self._ledger.page_size
        for group in range(self._num_groups):
            if group != home.group:
                holder = self._holder(request_id, group)
                copy = self._ledger.reserve(holder, [Place(group)], num_tokens)
                lent.append(Extent(group, 0, copy.pages_on(group)))
        self._tables[request_id] = PageTable((home,), tuple(lent))
        return self._tables[request_id]

    def _sliced(self, chunk: Chunk, tables: dict[int, PageTable]) -> list[Chunk]:
        table = self._tables.get(chunk.request_id)
        if table is None or chunk.is_decode or self.cut is None:
            return [chunk]
        groups = [extent.group for extent in (*table.lent, *table.extents)]
        sizes = self.cut(chunk.num_tokens, len(groups))
        if sizes is None:
            tables[chunk.request_id] = PageTable(table.extents)
            self._free(self._tables.pop(chunk.request_id), chunk.request_id)
            return [chunk]
        if chunk.samples:
            self._dismissed[chunk.request_id] = self._tables.pop(chunk.request_id)
        pieces, start = [], chunk.start
        for group, size in zip(groups, sizes, strict=True):
            if size:
                samples = chunk.samples and start + size == chunk.stop
                pieces.append(Chunk(chunk.request_id, start, size, samples, group=group))
            start += size
        self.num_slices += len(pieces)
        return pieces

    def _free(self, table: PageTable | None, request_id: int) -> None:
        for extent in table.lent if table is not None else ():
            self._ledger.release(self._holder(request_id, extent.group))

    def _holder(self, request_id: int, group: int) -> int:
        return FIRST_HOLDER + request_id * self._num_groups + group
