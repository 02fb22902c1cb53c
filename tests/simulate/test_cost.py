"""Step times follow from operations, bytes and links, as worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mnemosyne.config import MeshConfig
from mnemosyne.simulate.cost import GroupLoad, StepCost
from mnemosyne.simulate.hardware import Machine
from tests.simulate.machines import IDEAL, ROUND, SMALL

PROJECTIONS = 256 * 32 * (2 * 8 + 2 * 2)  # weights of a layer of SMALL
MLP = 3 * 256 * 512


def _cost(mesh: MeshConfig | None = None, **changes: object) -> StepCost:
    mesh = mesh or MeshConfig()
    stages = [4 // mesh.pp] * mesh.pp
    return StepCost(SMALL, ROUND, replace(IDEAL, **changes), mesh, stages)


def test_a_lone_decode_reads_the_weights_and_its_keys() -> None:
    (seconds,) = _cost().stage_s([GroupLoad(rows=1, num_sampled=1, decode_keys=1000.0)])

    weights = 4 * (PROJECTIONS + MLP) + 1000 * 256
    keys = 4 * 1000 * 2 * 2 * 32
    assert seconds == pytest.approx(2 * (weights + keys) / 1e12)


def test_a_large_chunk_computes_at_the_peak() -> None:
    rows, pairs = 4096, 4096 * 4097 / 2

    (seconds,) = _cost().stage_s([GroupLoad(rows=rows, chunks=[(pairs, 4096.0)])])

    operations = 2 * rows * 4 * (PROJECTIONS + MLP) + 4 * 4 * pairs * 8 * 32
    assert seconds == pytest.approx(operations / 1e14)


def test_each_efficiency_slows_its_own_part_only() -> None:
    decode = [GroupLoad(rows=1, decode_keys=1e6)]
    chunk = [GroupLoad(rows=8192, chunks=[(8192.0, 1.0)])]

    assert _cost(gemm=0.5).stage_s(decode) == _cost().stage_s(decode)
    assert _cost(kv=0.5).stage_s(decode)[0] > 1.9 * _cost().stage_s(decode)[0]
    assert _cost(gemm=0.5).stage_s(chunk)[0] == pytest.approx(2 * _cost().stage_s(chunk)[0], 0.01)


def test_tensor_parallelism_divides_the_work_and_pays_two_all_reduces_a_layer() -> None:
    load = [GroupLoad(rows=4096, chunks=[(4096.0**2 / 2, 4096.0)])]
    alone, halved = _cost(), _cost(MeshConfig(tp=2))

    (seconds,) = halved.stage_s(load)

    message = 2 * (1 / 2) * 4096 * 256 * 2 / 1e11
    reduces = 2 * 4 + 1  # and that of the embedding
    assert seconds == pytest.approx(alone.stage_s(load)[0] / 2 + reduces * message)


def test_a_step_takes_as_long_as_its_slowest_group() -> None:
    cost = _cost(MeshConfig(kvp=2))
    busy, idle = GroupLoad(rows=64, chunks=[(1e8, 1e6)]), GroupLoad()

    assert cost.stage_s([busy, idle]) == cost.stage_s([idle, busy]) == cost.stage_s([busy, busy])


def test_sharing_rows_costs_an_exchange_of_partials_whatever_the_context() -> None:
    cost = _cost(MeshConfig(kvp=2))
    load = {"rows": 64, "chunks": [(1e9, 1e7)]}
    apart, shared = GroupLoad(**load), GroupLoad(**load, shared_rows=64)

    difference = cost.stage_s([shared, shared])[0] - cost.stage_s([apart, apart])[0]

    assert difference == pytest.approx(4 * 64 * 8 * (32 * 2 + 4) / 1e11)


def test_few_rows_read_few_experts_and_many_rows_all() -> None:
    shape = replace(SMALL, num_experts=16, experts_per_token=2)
    cost = StepCost(shape, ROUND, IDEAL, MeshConfig(), [4])

    one = cost.stage_s([GroupLoad(rows=1)])[0]
    many = cost.stage_s([GroupLoad(rows=64)])[0]

    assert one == pytest.approx(4 * 2 * (PROJECTIONS + 2 * MLP) / 1e12)
    assert many == pytest.approx(4 * 2 * (PROJECTIONS + 16 * MLP) / 1e12, rel=0.001)


def test_a_wide_mlp_is_shared_by_the_groups() -> None:
    load = GroupLoad(rows=1, owned_rows=1)
    narrow, wide = _cost(MeshConfig(kvp=4)), _cost(MeshConfig(kvp=4, ffn="wide"))

    saved = narrow.stage_s([load] * 4)[0] - wide.stage_s([load] * 4)[0]

    gather, reduce = 3 * 512 / 1e11, 2 * (3 / 4) * 4 * 512 / 1e11
    assert saved == pytest.approx(4 * (2 * MLP * (3 / 4) / 1e12 - gather - reduce))


def test_an_axis_that_leaves_the_node_uses_the_network() -> None:
    within, across = (Machine.of(ROUND, MeshConfig(kvp=kvp, tp=2)) for kvp in (2, 4))

    assert (within.tp.is_network, within.kvp.is_network) == (False, False)
    assert (across.tp.is_network, across.kvp.is_network) == (False, True)
    assert across.kvp.bytes_per_s == 1e10


def test_the_terms_of_a_step_add_up_to_its_time() -> None:
    cost = _cost(MeshConfig(pp=2, tp=2), gemm=0.5, kv=0.7, layer_overhead="3us", step_overhead=1e-4)
    load = [GroupLoad(rows=70, num_sampled=6, decode_keys=3e5, chunks=[(64e4, 1e4)])]
    rates = cost.rates
    units = [getattr(rates, name) for name in rates.__dataclass_fields__]

    terms = cost.terms(load)

    total = sum(unit * term for unit, term in zip(units, terms, strict=True))
    assert total == pytest.approx(sum(cost.stage_s(load)))


def test_keys_that_are_handed_over_cost_what_the_projections_do_not_hide() -> None:
    cost, mesh = _cost(MeshConfig(kvp=2)), MeshConfig(kvp=2)
    rows, handed = 4096, 65536
    own = [GroupLoad(rows=rows), GroupLoad(rows=rows)]

    few_s, many_s = (
        cost.stage_s([own[0], GroupLoad(rows=rows, handed_rows=count)])[0]
        for count in (256, handed)
    )

    (alone_s,) = cost.stage_s(own)
    message_s = handed * 2 * 2 * 32 * 2 / Machine.of(ROUND, mesh).kvp.bytes_per_s
    projections_s = 2 * rows * PROJECTIONS / 1e14
    assert few_s == pytest.approx(alone_s)
    assert many_s == pytest.approx(alone_s + 4 * (message_s - projections_s))
