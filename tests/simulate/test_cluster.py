"""The simulated executor keeps the clock of a pipeline, and engine and scheduler run on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.cache.table import Extent, PageTable
from mnemosyne.cli.shapes import find_shape
from mnemosyne.config import MeshConfig
from mnemosyne.joining.simulated import Simulation, build_simulation
from mnemosyne.request import SamplingParams
from mnemosyne.schedule.plan import Admission, Chunk, Plan
from mnemosyne.simulate.cluster import SimulatedCluster
from mnemosyne.simulate.cost import StepCost
from mnemosyne.simulate.workload import Arrival
from tests.simulate.machines import IDEAL, ROUND, SMALL, simulate_config


def _cluster(mesh: MeshConfig | None = None, **changes: object) -> SimulatedCluster:
    mesh = mesh or MeshConfig()
    stages = [4 // mesh.pp] * mesh.pp
    return SimulatedCluster(StepCost(SMALL, ROUND, replace(IDEAL, **changes), mesh, stages))


def _chunk_plan(index: int, start: int, num_tokens: int) -> Plan:
    return Plan(index=index, chunks=(Chunk(0, start, num_tokens, samples=False),))


def test_consecutive_chunks_overlap_in_the_stages() -> None:
    cluster = _cluster(MeshConfig(pp=4), step_overhead=1.0)

    for index in range(4):
        cluster.submit(_chunk_plan(index, 32 * index, 32))
        assert cluster.now_s == pytest.approx(index + 1, rel=1e-3)
    for index in range(4):
        cluster.collect()
        assert cluster.now_s == pytest.approx(4 + index, rel=1e-3)


def test_a_stage_waits_for_the_message_of_the_one_before() -> None:
    cluster = _cluster(MeshConfig(pp=2, tp=4), step_overhead=1.0, network_latency=0.25)

    cluster.submit(_chunk_plan(0, 0, 32))
    cluster.collect()

    assert cluster.now_s == pytest.approx(2.25, rel=1e-3)


def test_groups_attend_to_their_own_shard() -> None:
    cluster = _cluster(MeshConfig(kvp=2))
    table = PageTable.spread([(1, np.arange(4)), (0, np.arange(4))], tokens_each=512)
    admission = Admission(
        request_id=0,
        prompt_ids=np.zeros(700, dtype=np.int64),
        params=SamplingParams(),
        seed=0,
        end_token_ids=(),
    )
    chunk = Chunk(0, 0, 512, samples=False)
    cluster.submit(Plan(0, (chunk,), admitted=(admission,), tables=((0, table),)))

    later, first = cluster.loads(_chunk_plan(1, 512, 64))

    assert (first.rows, later.rows) == (64, 64)
    assert first.chunks == [(64 * 512, 512)]
    assert later.chunks == [(64 * 65 / 2, 64)]
    assert (first.owned_rows, later.owned_rows) == (64, 0)
    assert (first.shared_rows, later.shared_rows) == (64, 64)


def test_slices_are_computed_by_their_groups_over_keys_that_are_handed_on() -> None:
    cluster = _cluster(MeshConfig(kvp=2))
    copy = Extent(0, 0, np.arange(8))
    table = PageTable((Extent(1, 0, np.arange(8)),), lent=(copy,))
    chunks = (Chunk(0, 0, 300, False, group=0), Chunk(0, 300, 200, False, group=1))
    plan = Plan(0, chunks, tables=((0, table),))
    cluster.submit(plan)

    helping, home = cluster.loads(plan)

    assert (helping.rows, home.rows) == (300, 200)
    assert (helping.handed_rows, home.handed_rows) == (0, 300)
    assert helping.chunks == [(300 * 301 / 2, 300)]
    assert home.chunks == [(200 * 300 + 200 * 201 / 2, 500)]
    assert helping.shared_rows == home.shared_rows == 0


def test_windowed_layers_see_and_read_less() -> None:
    shape = replace(SMALL, windows=(None, 8, 8, 8))
    cluster = SimulatedCluster(StepCost(shape, ROUND, IDEAL, MeshConfig(), [4]))

    (load,) = cluster.loads(_chunk_plan(0, 100, 4))

    whole, windowed = 4 * 100 + 4 * 5 / 2, 4 * 8
    assert load.chunks == [((whole + 3 * windowed) / 4, (104 + 3 * 11) / 4)]


def _simulation(*words: str) -> Simulation:
    return build_simulation(simulate_config(*words), find_shape("bench"))


ARRIVALS = st.lists(
    st.builds(
        Arrival,
        arrival_s=st.floats(0.0, 20.0),
        prompt_tokens=st.one_of(st.integers(1, 600), st.integers(2000, 9000)),
        output_tokens=st.integers(1, 5),
        priority=st.integers(0, 1),
    ),
    min_size=1,
    max_size=40,
).map(lambda arrivals: sorted(arrivals, key=lambda arrival: arrival.arrival_s))


@settings(max_examples=12, deadline=None)
@given(
    arrivals=ARRIVALS,
    policy=st.sampled_from(["fcfs", "edf", "lrs", "lars"]),
    chunk=st.sampled_from(["adaptive", "512"]),
    mesh=st.sampled_from(["mesh.pp=1", "mesh.pp=3", "mesh.kvp=2"]),
)
def test_any_workload_ends_with_every_token_and_no_page_held(
    arrivals: list[Arrival], policy: str, chunk: str, mesh: str
) -> None:
    # two groups hold the longest request together, one alone does not
    pages = ["cache.max_tokens=6K"] if "kvp" in mesh else ["cache.max_tokens=10K"]
    rules = [f"schedule.policy={policy}", f"schedule.chunk={chunk}"]
    simulation = _simulation(mesh, "hardware=cpu_2core", *pages, *rules)

    outputs = simulation.run(arrivals)

    for arrival, output in zip(arrivals, outputs, strict=True):
        assert output.finish_reason == "length"
        assert len(output.token_ids) == arrival.output_tokens
        assert sum(output.metrics.chunks) == arrival.prompt_tokens
        assert output.metrics.ttft_s > 0
    assert simulation.engine.scheduler.ledger.num_used == 0


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_thousand_requests_conserve_tokens_and_end(seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrivals = [
        Arrival(arrival_s, int(rng.choice([40, 300, 4000])), int(rng.integers(1, 4)))
        for arrival_s in np.cumsum(rng.exponential(0.002, 1000)).tolist()
    ]
    simulation = _simulation("mesh.pp=2", "cache.max_tokens=32K")

    outputs = simulation.run(arrivals)

    computed = sum(sum(output.metrics.chunks) for output in outputs)
    assert computed == sum(arrival.prompt_tokens for arrival in arrivals)
    assert [len(o.token_ids) for o in outputs] == [a.output_tokens for a in arrivals]
    assert simulation.engine.scheduler.ledger.num_used == 0
    assert not simulation.engine.has_work


def test_what_can_never_fit_is_refused_and_the_rest_is_served() -> None:
    simulation = _simulation("cache.max_tokens=4K")

    long, short = simulation.run([Arrival(0.0, 5000, 4), Arrival(0.1, 100, 4)])

    assert long.finish_reason == "error"
    assert "must fit the cache of 4096 tokens" in (long.error or "")
    assert short.finish_reason == "length"


def test_the_predictor_learns_the_simulated_machine() -> None:
    simulation = _simulation("hardware=cpu_2core")
    errors = []
    simulation.engine.on_step = lambda step: errors.append(step.predicted_s / step.actual_s - 1)

    simulation.run([Arrival(0.1 * i, 100 + 400 * i, 20) for i in range(12)])

    assert np.median(np.abs(errors)) < 0.05
