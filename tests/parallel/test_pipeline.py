"""Steps pass through the stages in order and exactly, each stage working while the others work."""

from __future__ import annotations

import json
import random
import time
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mnemosyne.config import MeshConfig
from mnemosyne.parallel.mesh import Mesh, init_mesh
from mnemosyne.parallel.pipeline import LinkError, Pipeline
from mnemosyne.parallel.trace import Trace
from tests.ranks import run_ranks

WIDTH = 16
ROWS = (1, 2, 4, 8, 16, 24, 32, 96)  # a few buckets
NUM_STEPS = 40


class Stages:
    """The functions of all stages, so that one rank can compute what all of them should."""

    def __init__(self, num_stages: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = [(64, WIDTH)] + [(WIDTH, WIDTH)] * num_stages
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        self.table_VE, *weights = tensors
        # They ask for gradients, to show that nobody records a graph.
        self.weights = [weight.requires_grad_() for weight in weights]

    def compute(self, stage: int, x: Tensor) -> Tensor:
        hidden_TE = self.table_VE[x] if stage == 0 else x
        return hidden_TE @ self.weights[stage]

    @torch.inference_mode()
    def compute_all(self, ids_T: Tensor) -> Tensor:
        x = ids_T
        for stage in range(len(self.weights)):
            x = self.compute(stage, x)
        return x


def ids_of(step: int, num_rows: int, lane: int = 0) -> Tensor:
    return (torch.arange(num_rows) * 5 + step * 11 + lane * 17) % 64


def make_pipeline(mesh: Mesh, dtype: torch.dtype, trace: Trace | None = None) -> Pipeline:
    return Pipeline(mesh, width=WIDTH, dtype=dtype, device=torch.device("cpu"), trace=trace)


def run_random_steps(mesh: Mesh, dtype: torch.dtype, look_ahead: int) -> None:
    """Steps of random sizes and naps, each announced ``look_ahead`` steps before it runs."""
    lane = mesh.kvp.index
    sizes = random.Random(lane).choices(ROWS, k=NUM_STEPS)
    naps = random.Random(mesh.rank).choices((0.0, 0.0, 0.001, 0.004), k=NUM_STEPS)
    stages, pipeline = Stages(mesh.pp.degree, dtype), make_pipeline(mesh, dtype)
    results: list[Tensor | None] = []
    outputs: list[weakref.ref[Tensor]] = []

    def forward(x: Tensor, *, nap_s: float) -> Tensor:
        output_TE = stages.compute(mesh.pp.index, x)
        time.sleep(nap_s)
        outputs.append(weakref.ref(output_TE))
        return output_TE

    num_announced = 0
    for step, num_rows in enumerate(sizes):
        for size in sizes[num_announced : step + look_ahead + 1]:
            pipeline.expect(size)
            num_announced += 1
        first_input = ids_of(step, num_rows, lane) if mesh.pp.index == 0 else None
        function = partial(forward, nap_s=naps[step])
        results.append(pipeline.run(function, num_rows, first_input, step=step))
    kept = [output for output in outputs if output() is not None]
    pipeline.drain()

    if mesh.pp.index < mesh.pp.degree - 1:
        assert results == [None] * NUM_STEPS
        assert len(kept) <= mesh.pp.degree
        return
    for step, (num_rows, result) in enumerate(zip(sizes, results, strict=True)):
        assert result is not None
        assert result.grad_fn is None
        assert result.equal(stages.compute_all(ids_of(step, num_rows, lane)))


def run_timed_steps(mesh: Mesh, naps: list[tuple[float, ...]], sizes: list[int]) -> list[Any]:
    """Steps that sleep, ``naps`` by step, then by stage. When each was computed: start, stop."""
    trace = Trace(mesh.rank, mesh.label)
    stages = Stages(mesh.pp.degree, torch.float32)
    pipeline = make_pipeline(mesh, torch.float32, trace)

    def forward(x: Tensor, *, nap_s: float) -> Tensor:
        time.sleep(nap_s)
        return stages.compute(mesh.pp.index, x)

    dist.barrier()
    for step, num_rows in enumerate(sizes):
        first_input = ids_of(step, num_rows) if mesh.pp.index == 0 else None
        function = partial(forward, nap_s=naps[step][mesh.pp.index])
        pipeline.run(function, num_rows, first_input, step=step)
    pipeline.drain()
    spans = json.loads(trace.dump())["spans"]
    return [(s["start_ns"], s["stop_ns"]) for s in spans if s["name"] == "compute"]


def two_stages() -> dict[str, list[Any]]:
    mesh = init_mesh(MeshConfig(pp=2), "cpu")
    run_random_steps(mesh, torch.float64, look_ahead=0)
    run_random_steps(mesh, torch.float32, look_ahead=1)
    run_random_steps(mesh, torch.bfloat16, look_ahead=4)
    return {
        "even": run_timed_steps(mesh, naps=[(0.02, 0.02)] * 20, sizes=[8] * 20),
        "late": run_timed_steps(mesh, naps=[(0.0, 0.5), *[(0.0, 0.0)] * 2], sizes=[3, 5, 7]),
    }


def three_stages() -> None:
    mesh = init_mesh(MeshConfig(pp=3), "cpu")
    run_random_steps(mesh, torch.float64, look_ahead=1)
    run_random_steps(mesh, torch.bfloat16, look_ahead=0)


def two_stages_of_two_groups() -> None:
    mesh = init_mesh(MeshConfig(pp=2, kvp=2), "cpu")
    run_random_steps(mesh, torch.float64, look_ahead=1)


def fail_on_the_first_stage() -> tuple[str, list[str]]:
    """Step 13, the third one, raises; what each stage is told, and the notes on it."""
    mesh = init_mesh(MeshConfig(pp=2), "cpu")
    stages, pipeline = Stages(2, torch.float32), make_pipeline(mesh, torch.float32)

    def forward(x: Tensor) -> Tensor:
        if mesh.pp.index == 0 and step == 13:
            raise ValueError("made to fail")
        return stages.compute(mesh.pp.index, x)

    try:
        for step in (11, 12, 13):
            pipeline.run(forward, 4, ids_of(step, 4) if mesh.pp.index == 0 else None, step=step)
    except (ValueError, LinkError) as error:
        pipeline.drain()  # what was sent before is still to arrive
        return repr(error), getattr(error, "__notes__", [])
    raise AssertionError("step 13 went through")


@pytest.fixture(scope="module")
def spans() -> list[dict[str, list[Any]]]:
    """Spans of the timed steps, by stage; the exactness of all others was asserted on the way."""
    return run_ranks(two_stages, 2)


def test_two_stages_compute_what_one_process_does(spans: list[dict[str, list[Any]]]) -> None:
    assert [len(by_stage["even"]) for by_stage in spans] == [20, 20]


def test_three_stages_compute_what_one_process_does() -> None:
    assert run_ranks(three_stages, 3) == [None] * 3


def test_groups_of_the_cache_do_not_mix() -> None:
    assert run_ranks(two_stages_of_two_groups, 4) == [None] * 4


def test_stages_compute_at_the_same_time(spans: list[dict[str, list[Any]]]) -> None:
    first, last = spans[0]["even"], spans[1]["even"]

    busy_ns = sum(stop - start for start, stop in first + last)
    wall_ns = last[-1][1] - first[0][0]

    assert wall_ns < 0.75 * busy_ns, f"{wall_ns / 1e6:.0f} ms for {busy_ns / 1e6:.0f} ms of work"


def test_a_slow_stage_does_not_hold_up_the_one_before(spans: list[dict[str, list[Any]]]) -> None:
    first, last = spans[0]["late"], spans[1]["late"]

    # Shapes that are new to both stages are no reason to wait either.
    assert first[2][1] < last[0][1]


def test_a_step_that_fails_says_where() -> None:
    first, last = run_ranks(fail_on_the_first_stage, 2)

    assert first == ("ValueError('made to fail')", ["on pp0/kvp0/tp0, in step 13"])
    assert last[0] == "LinkError('pp1/kvp0/tp0, step 13: receive of 4 rows from stage 0 failed')"
