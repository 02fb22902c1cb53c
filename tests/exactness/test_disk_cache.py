"""Prefixes that a process left on disk change no token and no logit of another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput
from tests.engines import add, drain, open_tiny, random_prompts
from tests.exactness.test_prefix_cache import (
    NATIVE,
    PARAMS,
    TURNS,
    assert_equal,
    logprobs_of,
    poison_unused,
)
from tests.leaves import counts_of
from tests.model_zoo.tiny import tiny_checkpoint
from tests.ranks import run_ranks
from tools.damage_leaves import KINDS, Folders, use_small_leaves

CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "num_layers": 3},
    "qwen2-windows": {"family": "qwen2", "window": 24, "num_layers": 3},
}


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_leaves(monkeypatch.setattr)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / request.param
    return tiny_checkpoint(path, **CHECKPOINTS[request.param])


def serve(llm: LLM, turns: list[np.ndarray] = TURNS) -> list[RequestOutput]:
    return [output for turn in turns for output in llm.generate(turn, PARAMS)]


def test_restored_prompts_give_the_logits_of_cold_ones(checkpoint: Path, tmp_path: Path) -> None:
    cache = {"dir": str(tmp_path / "leaves")}
    with open_tiny(checkpoint, chunk=64) as llm:
        cold = [output for turn in TURNS for output in (llm.clear_cache(), *serve(llm, [turn]))[1:]]

    with open_tiny(checkpoint, chunk=64, cache=cache) as llm:
        filled = serve(llm)
    found = []
    for page_size in (16, 24, 80):
        with open_tiny(checkpoint, chunk=37, cache=cache | {"page_size": page_size}) as llm:
            if page_size == 16:
                poison_unused(llm)
            found.append(serve(llm))
            assert counts_of(llm).files_refused == 0

    assert_equal(filled, cold)
    for outputs in found:
        assert_equal(outputs, cold)
        assert outputs[0].metrics.num_restored == 128
        assert outputs[1].metrics.num_cached >= 128 - 80


def test_salts_and_other_weights_keep_folders_apart(tmp_path: Path) -> None:
    cache = {"dir": str(tmp_path / "leaves")}
    paths = [tiny_checkpoint(tmp_path / f"{seed}", family="llama", seed=seed) for seed in (0, 1)]
    with open_tiny(paths[0], chunk=64, cache=cache) as llm:
        params = PARAMS.__class__(max_tokens=2, cache_salt="a")
        llm.generate(TURNS[0], params)

    with open_tiny(paths[0], chunk=64, cache=cache) as llm:
        (others,) = llm.generate(TURNS[0], PARAMS.__class__(max_tokens=2, cache_salt="b"))
        (own,) = llm.generate(TURNS[0], params)
    with open_tiny(paths[1], chunk=64, cache=cache) as llm:
        (foreign,) = llm.generate(TURNS[0], params)

    restored = [output.metrics.num_restored for output in (others, own, foreign)]
    assert restored == [0, 128, 0]


def test_clear_cache_empties_the_folder_as_well(checkpoint: Path, tmp_path: Path) -> None:
    with open_tiny(checkpoint, chunk=64, cache={"dir": str(tmp_path)}) as llm:
        serve(llm, TURNS[:1])

    with open_tiny(checkpoint, chunk=64, cache={"dir": str(tmp_path)}) as llm:
        assert list(tmp_path.glob("*.safetensors"))
        llm.clear_cache()
        assert not list(tmp_path.glob("*.safetensors"))
        (output,) = serve(llm, TURNS[:1])

    assert output.metrics.num_cached == 0


def test_others_run_while_a_prompt_is_restored_and_it_may_be_cancelled(
    checkpoint: Path, tmp_path: Path
) -> None:
    cache = {"dir": str(tmp_path)}
    (short,) = random_prompts((20,), seed=5)
    with open_tiny(checkpoint, chunk=64, cache=cache) as llm:
        cold = serve(llm, [short, *TURNS[:3]])

    with open_tiny(checkpoint, chunk=64, cache=cache) as llm:
        engine = llm.engine
        together = [add(engine, turn, PARAMS) for turn in (short, *TURNS[:3])]
        doomed = add(engine, TURNS[3], PARAMS)
        assert doomed.request_id is not None
        engine.step()
        engine.cancel(doomed.request_id)
        drain(engine)
        late = add(engine, TURNS[3], PARAMS)
        engine.step()
        assert late.request_id is not None
        engine.cancel(late.request_id)
        drain(engine)
        engine.step()
        used = engine.scheduler.ledger.num_used

    assert_equal(together, cold)
    # one is restored, and the others share it unless they lose patience
    assert max(output.metrics.num_restored for output in together) >= 128
    assert used == 0


@pytest.mark.parametrize("name", NATIVE[:1])
def test_native_kernels_give_the_bits_of_cold_prompts(name: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", family="qwen3", head_dim=32, mlp_width=64, window=24)
    found = []
    for _ in range(3):
        options: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "attention": name}
        cache = {"max_tokens": 2048, "page_size": 16, "dir": str(tmp_path / "leaves")}
        schedule = {"chunk": (64, 32, 48)[len(found)]}
        with LLM(str(path), operators=name, schedule=schedule, cache=cache, **options) as llm:
            found.append(serve(llm))

    assert found[1][0].metrics.num_restored == 128
    for outputs in found[1:]:
        for ours, cold in zip(outputs, found[0], strict=True):
            assert ours.token_ids == cold.token_ids
            assert np.array_equal(logprobs_of(ours), logprobs_of(cold))


MESHES: list[tuple[dict[str, int], dict[str, Any]]] = [
    ({"tp": 2}, {"page_size": 16}),
    ({"kvp": 2}, {"page_size": 12, "max_tokens_per_group": 108}),
    ({"pp": 2}, {"page_size": 24}),
]


def _serve_on_meshes(path: Path, folder: Path) -> list[Any]:
    """Each mesh adds what the last one did not have, and reads what it had."""
    torch.set_num_threads(1)
    use_small_leaves()
    found = []
    for count, (mesh, cache) in enumerate(MESHES, start=1):
        turns, cache = TURNS[:count], cache | {"dir": str(folder)}
        with LLM(
            str(path),
            dtype="float64",
            device="cpu",
            schedule={"chunk": 50},
            cache={"max_tokens": 1020 // cache["page_size"] * cache["page_size"]} | cache,
            mesh=mesh,
        ) as llm:
            outputs = serve(llm, turns)
            found.append([(o.token_ids, logprobs_of(o), o.metrics.num_restored) for o in outputs])
    return found


def test_leaves_of_one_mesh_are_read_on_another(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", family="llama", num_layers=4)
    with open_tiny(path, chunk=64) as llm:
        cold = serve(llm)

    of_ranks = run_ranks(_serve_on_meshes, 2, path, tmp_path / "leaves")
    use = {"page_size": 20, "dir": str(tmp_path / "leaves"), "max_tokens": 2000}
    with open_tiny(path, chunk=64, cache=use) as llm:
        alone = serve(llm)

    for found in of_ranks:
        for outputs in found:
            for (token_ids, logprobs, _), expected in zip(outputs, cold, strict=False):
                assert token_ids == expected.token_ids
                assert np.abs(logprobs - logprobs_of(expected)).max() < 1e-10
        assert [outputs[0][2] for outputs in found] == [0, 128, 128]
    assert_equal(alone, cold)
    assert alone[0].metrics.num_restored == 128


def test_damage_costs_no_token_and_heals(tmp_path: Path) -> None:
    """The short form of ``tools/damage_leaves.py``."""
    path = tiny_checkpoint(tmp_path / "checkpoint", family="llama")
    folders, rng = Folders(str(path), tmp_path), np.random.default_rng(0)

    for kind in KINDS:
        folders.check(kind, rng, kind)
