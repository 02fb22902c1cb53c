"""Weights are checked as a whole first, then copied by slice; no second copy exists."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.runtime import weights
from mnemosyne.runtime.weights import load_weights
from tests.model_zoo.tiny import tiny_checkpoint

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


def empty(path: Path, dtype: torch.dtype = torch.float64, **choices: Any) -> Decoder:
    return Decoder(read_spec(path), dtype=dtype, device="meta", **choices)


def stored(path: Path) -> Tensors:
    return {name: t for file in path.glob("*.safetensors") for name, t in load_file(file).items()}


def edit(path: Path, change: Callable[[Tensors], None]) -> None:
    """Change the tensors of a one-file checkpoint."""
    tensors = stored(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_is_the_stored_tensor_in_its_dtype(
    tmp_path: Path, dtype: torch.dtype, shard_bytes: int | None
) -> None:
    path = tiny_checkpoint(tmp_path, family="qwen2", shard_bytes=shard_bytes)
    assert (path / "model.safetensors.index.json").exists() == (shard_bytes is not None)
    tensors, decoder = stored(path), empty(path, dtype)

    load_weights(decoder, path)

    names = decoder.checkpoint_names()
    for ours, parameter in decoder.named_parameters():
        assert torch.equal(parameter, tensors[names[ours]].to(dtype)), ours
        assert not parameter.requires_grad


def test_parameters_that_are_allocated_are_filled_in_place(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    decoder = Decoder(read_spec(path), dtype=torch.float64, device="cpu")
    before = {name: parameter.data_ptr() for name, parameter in decoder.named_parameters()}

    load_weights(decoder, path)

    after = {name: parameter.data_ptr() for name, parameter in decoder.named_parameters()}
    assert after == before
    assert torch.equal(decoder.norm.weight, stored(path)[NORM])


@pytest.mark.parametrize("block_bytes", [1, 1000, 1 << 30])
def test_blocks_of_any_size_give_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    path = tiny_checkpoint(tmp_path)
    expected, decoder = empty(path), empty(path)
    load_weights(expected, path)

    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    load_weights(decoder, path)

    expected_parameters = expected.state_dict()
    for name, parameter in decoder.state_dict().items():
        assert torch.equal(parameter, expected_parameters[name])


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, shard_bytes=20_000)
    seen: list[tuple[int, int]] = []

    load_weights(empty(path), path, progress=lambda done, total: seen.append((done, total)))

    total = sum(tensor.nbytes for tensor in stored(path).values())
    assert [t for _, t in seen] == [total] * len(seen)
    assert seen[-1][0] == total
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_a_stage_reads_its_own_tensors_alone(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tied=True)
    tensors, totals = stored(path), set()
    stage = empty(path, layers=range(1, 2))

    load_weights(stage, path, progress=lambda _, total: totals.add(total))

    own = {*stage.checkpoint_names().values()}
    assert own == {
        n for n in tensors if ".layers.1." in n or n in (NORM, "model.embed_tokens.weight")
    }
    assert totals == {sum(tensors[name].nbytes for name in own)}
    assert torch.equal(stage.head.weight, tensors["model.embed_tokens.weight"])


def test_all_that_does_not_match_is_listed_at_once(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)

    def spoil(tensors: Tensors) -> None:
        del tensors[DOWN]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
        tensors[NORM] = torch.zeros(31)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    edit(path, spoil)
    decoder = empty(path)

    with pytest.raises(
        ValueError, match=r"must be those that its config\.json describes"
    ) as raised:
        load_weights(decoder, path)

    message = str(raised.value)
    assert f"missing: {DOWN}" in message
    assert "surplus: model.layers.7.mlp.up_proj.weight" in message
    assert f"misshapen: {NORM} [31] instead of [32]" in message
    assert "not floating point: lm_head.weight I8" in message
    assert all(parameter.is_meta for parameter in decoder.parameters())  # nothing was read


def test_a_stage_notices_what_another_stage_lacks(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    edit(path, lambda tensors: tensors.__delitem__(DOWN))

    with pytest.raises(ValueError, match=f"missing: {DOWN}"):
        load_weights(empty(path, layers=range(1)), path)


def test_repeated_heads_and_stored_angles_are_no_surplus(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tied=True)

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    edit(path, add)
    decoder = empty(path)

    load_weights(decoder, path)

    assert decoder.head is None


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)

    def rename(tensors: Tensors) -> None:
        for index in range(30):
            tensors[f"extra.{index:02}"] = torch.zeros(1)

    edit(path, rename)

    with pytest.raises(ValueError, match=r"extra\.19 and 10 more;"):
        load_weights(empty(path), path)


@pytest.mark.parametrize("num_bytes", [0, 5, 300, -1])
def test_a_truncated_file_is_named(tmp_path: Path, num_bytes: int) -> None:
    path = tiny_checkpoint(tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])

    with pytest.raises(ValueError, match=r"must be whole .* got '.*/model\.safetensors'"):
        load_weights(empty(path), path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, shard_bytes=20_000)
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(ValueError, match=f"weights file must exist, got '.*{shard.name}'"):
        load_weights(empty(path), path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path: Path, content: str) -> None:
    path = tiny_checkpoint(tmp_path, shard_bytes=20_000)
    (path / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    with pytest.raises(ValueError, match=r"index\.json must .*, got .*; "):
        load_weights(empty(path), path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    (path / "model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"must hold model\.safetensors or .*index\.json"):
        load_weights(empty(path), path)


LOAD_UNDER_A_LIMIT = """
import pathlib, resource, sys, torch
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.runtime import weights

torch.set_num_threads(1)
weights.BLOCK_BYTES = 4 << 20
path, slack_bytes = pathlib.Path(sys.argv[1]), int(sys.argv[2])
decoder = Decoder(read_spec(path), dtype=torch.bfloat16, device="meta")
weights_bytes = sum(parameter.nbytes for parameter in decoder.parameters())
with weights.open_weights(path / "model.safetensors"):  # the mapped file itself counts
    status = pathlib.Path("/proc/self/status").read_text()
data_bytes = int(status.split("VmData:")[1].split()[0]) << 10
limit = data_bytes + weights_bytes + slack_bytes
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
weights.load_weights(decoder, path)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures memory as Linux does")
@pytest.mark.parametrize(("slack_bytes", "fits"), [(16 << 20, True), (-(16 << 20), False)])
def test_loading_needs_one_block_beside_the_weights(
    tmp_path: Path, slack_bytes: int, fits: bool
) -> None:
    path = tiny_checkpoint(tmp_path, tied=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 1 << 20}))
    embedding = torch.ones(1 << 20, 32)  # 128 MiB in the file, 64 MiB in the model
    edit(path, lambda tensors: tensors.update({"model.embed_tokens.weight": embedding}))

    command = [sys.executable, "-c", LOAD_UNDER_A_LIMIT, str(path), str(slack_bytes)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (run.returncode == 0) == fits, run.stderr
