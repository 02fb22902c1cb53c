"""A model cut over ranks computes what it computes whole, and each rank reads its part alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mnemosyne.config import MeshConfig
from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import read_spec
from tests.model_zoo.tiny import tiny_checkpoint
from tests.parallel.sharded import Seen, run_checkpoints, run_random
from tests.ranks import run_ranks

TOKEN_IDS = torch.randint(96, (25,), generator=torch.Generator().manual_seed(3)).tolist()

# 4 query heads, 2 KV heads, an MLP of 48 and 96 words
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "bias": True},
    "llama tied": {"family": "llama", "bias": True, "tied": True, "num_layers": 3},
    "mistral": {"family": "mistral", "window": 5, "num_layers": 3},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "bias": True, "head_dim": 24, "shard_bytes": 20_000},
}
MESHES_OF_2 = (MeshConfig(tp=2), MeshConfig(pp=2), MeshConfig(kvp=2, ffn="wide"))
MESHES_OF_4 = (
    MeshConfig(tp=4),
    MeshConfig(kvp=2, tp=2, ffn="wide"),
    MeshConfig(kvp=4, ffn="wide"),
    MeshConfig(pp=2, tp=2),
)
MESHES = MESHES_OF_2 + MESHES_OF_4


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_checkpoint(root / name, **choices) for name, choices in MODELS.items()}


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path]) -> dict[str, Seen]:
    """Each model in one process."""
    cases = [(path, MeshConfig()) for path in checkpoints.values()]
    return dict(zip(checkpoints, run_checkpoints(cases, TOKEN_IDS), strict=True))


@pytest.fixture(scope="module")
def cut(checkpoints: dict[str, Path]) -> dict[tuple[str, str], list[Seen]]:
    """Each model on each mesh, by rank."""
    found = {}
    for meshes in (MESHES_OF_2, MESHES_OF_4):
        keys = [(name, str(mesh)) for name in checkpoints for mesh in meshes]
        cases = [(path, mesh) for path in checkpoints.values() for mesh in meshes]
        by_rank = run_ranks(run_checkpoints, meshes[0].world_size, cases, TOKEN_IDS)
        found |= dict(zip(keys, zip(*by_rank, strict=True), strict=True))
    return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_one_process(
    model: str, mesh: MeshConfig, whole: dict[str, Seen], cut: dict[tuple[str, str], list[Seen]]
) -> None:
    found = [seen.logits_TV for seen in cut[model, str(mesh)]]

    last_stage = mesh.world_size // mesh.pp
    assert found[:-last_stage] == [None] * (mesh.world_size - last_stage)
    for logits_TV in found[-last_stage:]:
        torch.testing.assert_close(logits_TV, whole[model].logits_TV, rtol=0, atol=1e-10)
        assert torch.equal(logits_TV, found[-1]), "ranks that sample must sample the same"


@pytest.mark.parametrize("model", MODELS)
def test_loaded_parameters_are_plain_tensors_of_this_rank(
    model: str, cut: dict[tuple[str, str], list[Seen]]
) -> None:
    for seen in cut[model, str(MeshConfig(tp=2))]:
        shapes = {name: tuple(p.shape) for name, p in seen.parameters.items()}
        assert all(type(p) is Tensor for p in seen.parameters.values())
        assert shapes["embed.weight"] == (48, 32)
        assert shapes["layers.0.mlp.down.weight"] == (32, 24)
    for seen in cut[model, str(MeshConfig(kvp=2, tp=2, ffn="wide"))]:
        assert seen.parameters["layers.0.mlp.gate.weight"].shape == (12, 32)


@pytest.mark.parametrize("model", MODELS)
def test_ranks_beyond_the_kv_heads_share_them_with_their_neighbours(
    model: str, whole: dict[str, Seen], cut: dict[tuple[str, str], list[Seen]]
) -> None:
    name = "layers.1.attn.wk.weight"
    heads = whole[model].parameters[name].chunk(2)

    for rank, seen in enumerate(cut[model, str(MeshConfig(tp=4))]):
        assert torch.equal(seen.parameters[name], heads[rank // 2])


@pytest.mark.parametrize("model", MODELS)
def test_the_local_shape_counts_what_each_rank_holds(
    model: str, checkpoints: dict[str, Path], cut: dict[tuple[str, str], list[Seen]]
) -> None:
    spec = read_spec(checkpoints[model])

    for mesh in MESHES:
        local, counts = spec.local(mesh), []
        for seen in cut[model, str(mesh)]:
            held = {name: p for name, p in seen.parameters.items() if name.startswith("layers.")}
            counts.append(sum(p.numel() for p in held.values()) / len(seen.layers))
            wq, wk = (held[f"layers.{seen.layers[0]}.attn.{name}.weight"] for name in ("wq", "wk"))
            assert len(wq) == local.num_heads * spec.head_dim
            assert len(wk) == local.num_kv_heads * spec.head_dim
        assert max(counts) == local.layer_params()  # the first rank alone adds biases after a sum


@pytest.mark.parametrize("mesh", [MeshConfig(tp=2), MeshConfig(tp=4)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_each_rank_reads_its_slices_and_the_norms(
    model: str,
    mesh: MeshConfig,
    whole: dict[str, Seen],
    cut: dict[tuple[str, str], list[Seen]],
) -> None:
    sizes = {name: p.nbytes for name, p in whole[model].parameters.items()}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    summed = sum(size for name, size in sizes.items() if name.endswith(("wo.bias", "down.bias")))
    kv = sum(size for name, size in sizes.items() if ".wk." in name or ".wv." in name)
    copies = max(1, mesh.tp // 2)
    expected = (
        norms + kv * copies // mesh.tp + (sum(sizes.values()) - norms - summed - kv) // mesh.tp
    )

    assert whole[model].num_bytes == sum(sizes.values())
    read = [seen.num_bytes for seen in cut[model, str(mesh)]]
    assert read == [expected + summed] + [expected] * (mesh.tp - 1)


def test_stages_hold_uneven_runs_of_layers(cut: dict[tuple[str, str], list[Seen]]) -> None:
    stages = [seen.layers for seen in cut["mistral", str(MeshConfig(pp=2, tp=2))]]

    assert stages == [range(2), range(2), range(2, 3), range(2, 3)]


@pytest.mark.parametrize("tied", [False, True])
def test_random_weights_are_slices_of_the_same_model_and_words_need_not_divide(tied: bool) -> None:
    spec = dataclasses.replace(
        bench_spec(),
        vocab_size=38,
        width=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_width=48,
        rope=RopeSpec(theta=10_000.0, dim=8),
        tied=tied,
    )
    ids = [token % 38 for token in TOKEN_IDS]
    one = run_random(spec, MeshConfig(), ids)

    first, *_, last = run_ranks(run_random, 4, spec, MeshConfig(tp=4), ids)

    torch.testing.assert_close(last.logits_TV, one.logits_TV, rtol=0, atol=1e-12)
    embed, down = one.parameters["embed.weight"], one.parameters["layers.2.mlp.down.weight"]
    assert torch.equal(first.parameters["embed.weight"], embed[:10])
    assert torch.equal(last.parameters["embed.weight"], embed[30:])  # 8 words instead of 10
    assert torch.equal(last.parameters["layers.2.mlp.down.weight"], down[:, 36:])


def test_one_process_does_not_import_dtensor() -> None:
    program = (
        "import sys, mnemosyne.joining.rank; sys.exit('torch.distributed.tensor' in sys.modules)"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


def test_models_of_the_tests_are_what_their_remark_says(checkpoints: dict[str, Path]) -> None:
    for path in checkpoints.values():
        spec = read_spec(path)
        assert (spec.num_heads, spec.num_kv_heads, spec.mlp_width) == (4, 2, 48)
