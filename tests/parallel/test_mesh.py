"""The mesh is refused with numbers or made as declared; collectives work in every dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mnemosyne.config import MeshConfig
from mnemosyne.parallel.collectives import (
    SMALL_BYTES,
    all_gather,
    all_reduce_sum,
    gather_counts,
)
from mnemosyne.parallel.mesh import check_mesh, head_mesh, init_mesh, single_mesh
from mnemosyne.shape import ModelShape
from tests.ranks import RankError, run_ranks

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
SHAPE = ModelShape(
    num_layers=3,
    width=24,
    num_heads=12,
    num_kv_heads=2,
    head_dim=2,
    mlp_width=48,
    vocab_size=100,
)


def describe(config: MeshConfig) -> dict[str, Any]:
    """Describe what a rank sees of its mesh."""
    mesh = init_mesh(config, "cpu")
    everyone = {
        axis.name: all_gather(torch.tensor([mesh.rank]), axis).flatten().tolist()
        for axis in (mesh.pp, mesh.kvp, mesh.tp, mesh.ffn)
    }
    return {
        "label": mesh.label,
        "ranks": everyone,
        "indices": {a.name: a.index for a in (mesh.pp, mesh.kvp, mesh.tp, mesh.ffn)},
        "counts": gather_counts(2**40 + mesh.rank, mesh),
    }


def test_axes_join_the_ranks_that_differ_in_nothing_else() -> None:
    seen = run_ranks(describe, 8, MeshConfig(pp=2, kvp=2, tp=2, ffn="wide"))

    assert [s["label"] for s in seen[:3]] == ["pp0/kvp0/tp0", "pp0/kvp0/tp1", "pp0/kvp1/tp0"]
    assert seen[6]["ranks"] == {"pp": [2, 6], "kvp": [4, 6], "tp": [6, 7], "ffn": [4, 5, 6, 7]}
    assert seen[6]["indices"] == {"pp": 1, "kvp": 1, "tp": 0, "ffn": 2}
    assert [s["counts"] for s in seen] == [[2**40 + rank for rank in range(8)]] * 8


def test_the_mlp_is_sharded_as_the_heads_unless_asked_otherwise() -> None:
    seen = run_ranks(describe, 4, MeshConfig(kvp=2, tp=2))

    assert seen[3]["ranks"] == {"pp": [3], "kvp": [1, 3], "tp": [2, 3], "ffn": [2, 3]}


def reduce_and_gather(config: MeshConfig) -> dict[torch.dtype, tuple[Any, Any]]:
    axis = init_mesh(config, "cpu").tp
    found = {}
    for dtype in DTYPES:
        x = torch.tensor([[1.0, 2.0], [3.0, axis.index]]).to(dtype)
        gathered = all_gather(x.t(), axis)  # not contiguous
        total = all_reduce_sum(x.t(), axis)
        assert gathered.dtype == total.dtype == dtype
        found[dtype] = gathered.tolist(), total.tolist()
    return found


@pytest.mark.parametrize("degree", [2, 3])
def test_collectives_take_every_dtype_and_any_layout(degree: int) -> None:
    for found in run_ranks(reduce_and_gather, degree, MeshConfig(tp=degree)):
        for gathered, total in found.values():
            assert gathered == [[[1, 3], [2, index]] for index in range(degree)]
            assert total == [[degree, 3 * degree], [2 * degree, sum(range(degree))]]


def sum_random(config: MeshConfig) -> list[torch.Tensor]:
    axis = init_mesh(config, "cpu").tp
    generator = torch.Generator().manual_seed(axis.index)
    x = torch.randn(SMALL_BYTES, generator=generator)
    dtypes = (torch.float32, torch.bfloat16)
    return [all_reduce_sum(x[:size].to(d), axis) for d in dtypes for size in (1000, SMALL_BYTES)]


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_sums_have_the_same_bits_on_every_rank(degree: int) -> None:
    first, *others = run_ranks(sum_random, degree, MeshConfig(tp=degree))

    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_one_process_has_a_mesh_without_torch_distributed() -> None:
    mesh = init_mesh(MeshConfig(ffn="wide"), "cpu")
    x = torch.ones(3)

    assert mesh.label == single_mesh().label == "pp0/kvp0/tp0"
    assert all_reduce_sum(x, mesh.tp) is x
    assert all_gather(x, mesh.ffn).shape == (1, 3)
    assert gather_counts(7, mesh) == [7]
    assert mesh.device_mesh is None
    assert not dist.is_initialized()


def test_degrees_that_are_not_the_processes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"must equal the number of processes, 1, got 2 x 1 x 3 = 6; start 6"
    ):
        init_mesh(MeshConfig(pp=2, tp=3), "cpu")

    with pytest.raises(RankError, match=r"the number of processes, 2, got 1 x 4 x 1 = 4"):
        run_ranks(describe, 2, MeshConfig(kvp=4))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(pp=4), "mesh.pp must be at most the number of layers, 3, got 4"),
        (MeshConfig(tp=5), "mesh.tp must divide the 12 query heads, .* got 5; use one of 1, 2, 4,"),
        (MeshConfig(tp=3), "divide the 2 KV heads or be a multiple of them, got 3"),
        (MeshConfig(kvp=5, tp=2, ffn="wide"), r"kvp x tp must divide the MLP width, 48, .* got 10"),
    ],
    ids=str,
)
def test_models_that_the_degrees_do_not_cut_are_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mesh(config, SHAPE)


def test_the_mlp_and_the_vocabulary_must_be_cut_as_well() -> None:
    with pytest.raises(ValueError, match=r"mesh.tp must divide the MLP width, 50, .* got 4"):
        check_mesh(MeshConfig(tp=4), replace(SHAPE, mlp_width=50))
    with pytest.raises(ValueError, match="every rank some of the 5 words of the vocabulary, got 4"):
        check_mesh(MeshConfig(tp=4), replace(SHAPE, vocab_size=5))


@pytest.mark.parametrize(
    "config",
    [MeshConfig(pp=3, kvp=5, tp=6), MeshConfig(tp=12), MeshConfig(kvp=2, tp=4, ffn="wide")],
    ids=str,
)
def test_models_that_the_degrees_cut_are_taken(config: MeshConfig) -> None:
    check_mesh(config, SHAPE)


def held_head(config: MeshConfig) -> int:
    return head_mesh(init_mesh(config, "cpu"), num_kv_heads=2).get_local_rank()


def test_neighbours_share_a_kv_head_where_ranks_outnumber_them() -> None:
    assert run_ranks(held_head, 4, MeshConfig(tp=4)) == [0, 0, 1, 1]
