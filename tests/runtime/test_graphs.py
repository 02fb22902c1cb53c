"""Steps that are replayed: the tokens of steps that are not, from tensors that stay in place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mnemosyne.attention import ByKind, FlexBackend
from mnemosyne.attention.chunked import Chunked
from mnemosyne.attention.fixed_decodes import FixedDecodes
from mnemosyne.attention.triton import TritonBackend
from mnemosyne.llm import LLM
from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.runtime.graphs import DecodeGraphs
from tests.engines import greedy, open_tiny, random_prompts, worker_of
from tests.model_zoo.tiny import tiny_checkpoint

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="in the interpreter; a GPU has tests of its own"
)

PROMPTS = random_prompts((1, 5, 33, 41, 40))
NUM_TOKENS = 10
# what a GPU cannot record: the host waits for a value, or a shape depends on one
ASKS_THE_HOST = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero"}


class Recorder(TorchDispatchMode):
    """The operations that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(keywords or {}))


class FakeGraph:
    """Calls again what it captured: it sees what that closed over, and nothing of a later step."""

    replays = 0
    recorder = Recorder()

    def capture(self, run: Callable[[], Tensor]) -> Tensor:
        self._run = run
        with self.recorder:
            self._result = run()
        return self._result

    def replay(self) -> None:
        FakeGraph.replays += 1
        self._result.copy_(self._run())


@pytest.fixture(scope="module", params=[None, 24], ids=["full", "window"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "tiny"
    return tiny_checkpoint(path, family="mistral", window=request.param)


def graphs_of(llm: LLM, rows: tuple[int, ...] = (1, 2, 4)) -> DecodeGraphs:
    worker = worker_of(llm)
    pool = worker.pool
    return DecodeGraphs(
        worker._model,
        worker._layers,
        pool,
        operators=worker._operators,
        backend_for=lambda num_rows, page_ids: FixedDecodes(
            TritonBackend(),
            pool.k[0],
            num_rows=num_rows,
            page_size=pool.page_size,
            page_ids=page_ids,
        ),
        new_graph=FakeGraph,
        rows=rows,
    )


def test_replayed_steps_give_the_tokens_of_computed_ones(checkpoint: Path) -> None:
    with open_tiny(checkpoint, chunk=64) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, greedy(NUM_TOKENS))]
        worker_of(llm)._graphs = graphs_of(llm)
        before = FakeGraph.replays

        outputs = [output.token_ids for output in llm.generate(PROMPTS, greedy(NUM_TOKENS))]
        alone = llm.generate(PROMPTS[2], greedy(NUM_TOKENS))[0].token_ids

    assert outputs == expected
    assert alone == expected[2]
    # alone, all but the first token; together, five rows are eight with padding: in no graph
    assert FakeGraph.replays - before >= NUM_TOKENS - 1


def test_fewer_requests_than_rows_leave_padding_that_touches_nobody(checkpoint: Path) -> None:
    with open_tiny(checkpoint, chunk=64) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS[:3], greedy(NUM_TOKENS))]
        worker_of(llm)._graphs = graphs_of(llm)
        before = FakeGraph.replays

        outputs = [output.token_ids for output in llm.generate(PROMPTS[:3], greedy(NUM_TOKENS))]

    assert outputs == expected
    assert FakeGraph.replays - before == NUM_TOKENS - 1


def test_nothing_that_is_captured_asks_the_host(checkpoint: Path) -> None:
    with open_tiny(checkpoint) as llm:
        graphs_of(llm, rows=(2,))

    assert "index_copy_" in FakeGraph.recorder.names
    assert not FakeGraph.recorder.names & ASKS_THE_HOST


def test_chunks_are_not_recorded(checkpoint: Path) -> None:
    spec = bench_spec()
    chunked = replace(spec, windows=(8192,) * spec.num_layers, chunked=True)
    assert spec.is_static
    assert not chunked.is_static

    with open_tiny(checkpoint) as llm:
        worker = worker_of(llm)
        worker._layers = replace(worker._layers, windows=[Chunked(32), None])

        with pytest.raises(AssertionError, match="rows of chunks"):
            graphs_of(llm, rows=(1,))


def test_a_backend_of_two_is_recorded_as_the_one_that_decodes() -> None:
    kernels, other = TritonBackend(), FlexBackend()

    assert ByKind(kernels, other).can_record == kernels.can_record
    assert not ByKind(other, kernels).can_record
    pool = {"num_rows": 2, "page_size": 16, "page_ids": torch.zeros(4, dtype=torch.int64)}
    fixed = ByKind(kernels, other).fixed(torch.zeros(2, 64, 16), **pool)
    assert isinstance(fixed, FixedDecodes)


def test_what_the_interpreter_runs_is_not_recorded() -> None:
    assert not TritonBackend().can_record
