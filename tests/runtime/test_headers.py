"""Weights are read from where the files of a checkpoint say they lie, or refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mnemosyne.joining.checkpoint import find_checkpoint
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.spec import read_spec
from mnemosyne.model_zoo.tensors import tensor_shapes
from mnemosyne.runtime.weights import load_weights
from tests.engines import greedy, open_tiny
from tests.model_zoo.tiny import oracle, tiny_checkpoint

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", shard_bytes=20_000)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=" must ") as caught:
        find_checkpoint(str(path))
    said = str(caught.value)
    assert said.isprintable()
    assert "; " in said
    return said


def edit_index(path: Path, **entries: Any) -> dict[str, str]:
    """Change entries of the index; its weight map as it was."""
    file = path / INDEX
    index = json.loads(file.read_text())
    file.write_text(json.dumps(index | entries))
    return index["weight_map"]


def place(path: Path, **moved: str) -> None:
    places = edit_index(path)
    edit_index(path, weight_map=places | moved)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_shapes_from_the_spec_are_those_of_the_modules(
    tmp_path: Path, family: str, tied: bool
) -> None:
    spec = read_spec(tiny_checkpoint(tmp_path, family=family, tied=tied, bias=True))
    decoder = Decoder(spec, dtype=torch.float64, device="meta")

    names = decoder.checkpoint_names()
    built = {names[ours]: tuple(weight.shape) for ours, weight in decoder.named_parameters()}
    assert tensor_shapes(spec) == built


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_stored_head_that_differs_from_its_embedding_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    path = tiny_checkpoint(tmp_path, tied=True)
    tensors = load_file(path / "model.safetensors")
    head = torch.randn(tensors[EMBEDDING].shape, generator=torch.Generator().manual_seed(9))
    save_file(tensors | {HEAD: head.to(dtype)}, path / "model.safetensors", {"format": "pt"})

    with caplog.at_level(logging.WARNING), open_tiny(path) as llm:
        (output,) = llm.generate([[5, 6, 7]], greedy(12))

    ids = torch.tensor([[5, 6, 7]])
    expected = oracle(path).generate(ids, max_new_tokens=12, do_sample=False)[0, 3:]
    assert output.token_ids == expected.tolist()
    assert "stored head differs" in caplog.text


def test_a_stored_head_that_is_the_embedding_stays_tied(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tied=True)
    tensors = load_file(path / "model.safetensors")

    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, path / "model.safetensors")
    assert find_checkpoint(str(path)).spec.tied

    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1
    save_file(tensors, path / "model.safetensors")
    assert not find_checkpoint(str(path)).spec.tied


def test_no_decoder_drops_a_head_of_its_own(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, tied=True)
    decoder = Decoder(read_spec(path), dtype=torch.float64, device="meta")
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING] + 1}, path / "model.safetensors")

    with pytest.raises(ValueError, match=r"lm_head\.weight of .* must be the embedding"):
        load_weights(decoder, path)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    places = edit_index(sharded)
    other = next(file for file in sorted(set(places.values())) if file != places[NORM])
    save_file(load_file(sharded / other) | {NORM: torch.ones(32)}, sharded / other)

    assert f"{NORM} also in {other}" in refusal(sharded)


def test_a_shard_that_lacks_what_the_index_puts_there_is_refused(sharded: Path) -> None:
    places = edit_index(sharded)
    other = next(file for file in sorted(set(places.values())) if file != places[NORM])
    place(sharded, **{NORM: other})

    said = refusal(sharded)

    assert f"{NORM} in {other}, which lacks it" in said
    assert f"{NORM} also in {places[NORM]}" in said


def test_a_tensor_that_the_index_does_not_name_is_refused(sharded: Path) -> None:
    places = edit_index(sharded)
    edit_index(sharded, weight_map={k: v for k, v in places.items() if k != NORM})

    assert f"{NORM} of {places[NORM]} nowhere" in refusal(sharded)


@pytest.mark.parametrize(
    "elsewhere", ["../model.safetensors", "/etc/passwd", "a/b", "..", ".", "", 3, None]
)
def test_an_index_leads_to_files_beside_it_only(sharded: Path, elsewhere: Any) -> None:
    shutil.copy(sharded / edit_index(sharded)[NORM], sharded.parent / "model.safetensors")
    place(sharded, **{NORM: elsewhere})

    assert f"weight_map.{NORM} in" in refusal(sharded)


def test_two_forms_of_the_same_weights_are_refused(sharded: Path) -> None:
    shards = sharded.glob("*.safetensors")
    tensors = {name: weight for shard in shards for name, weight in load_file(shard).items()}
    save_file(tensors, sharded / "model.safetensors")
    assert "must hold model.safetensors or" in refusal(sharded)

    edit_index(sharded, weight_map=dict.fromkeys(tensors, "model.safetensors"))
    assert find_checkpoint(str(sharded)).path == sharded  # now the index names the file


def test_files_that_the_index_does_not_name_are_another_matter(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(save({"tok_embeddings": torch.ones(2)}))

    assert find_checkpoint(str(sharded)).path == sharded


def test_shards_without_their_index_are_refused(sharded: Path) -> None:
    (sharded / INDEX).unlink()

    assert "must hold model.safetensors or" in refusal(sharded)


def test_an_index_that_counts_wrongly_is_said(
    sharded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        find_checkpoint(str(sharded))
    assert not caplog.records

    edit_index(sharded, metadata={"total_size": 7})
    with caplog.at_level(logging.WARNING):
        find_checkpoint(str(sharded))
    assert "counts 7 bytes" in caplog.text

    edit_index(sharded, metadata=[7])
    assert "metadata in" in refusal(sharded)


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    begin = header.index(b'"model.norm.weight"')
    twice = header[:-1] + b"," + header[begin : header.index(b"}", begin) + 1] + b"}"
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])

    assert "'model.norm.weight' is there twice" in refusal(path)


def test_a_header_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write((64 << 20).to_bytes(8, "little"))

    assert "a header of 67,108,864 bytes" in refusal(path)


def test_names_of_tensors_are_shown_harmlessly(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {"\x1b[2J\n" + "a" * 9999: torch.ones(1)}, path / "model.safetensors")

    said = refusal(path)

    assert r"surplus: \x1b[2J\naaa" in said
    assert len(said) < 2000


def test_an_adapter_on_top_is_refused(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path)
    (path / "adapter_config.json").write_text("{}")

    assert "with adapter_config.json" in refusal(path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 2**24}, "instead of [16777216, 32] (vocab_size, hidden_size)"),
        ({"num_hidden_layers": 10_000}, "missing: model.layers."),
        ({"intermediate_size": 2**20}, "(intermediate_size, hidden_size)"),
        ({"hidden_size": 64}, "[32] instead of [64] (hidden_size)"),
        ({"num_key_value_heads": 1}, "(num_key_value_heads x head_dim, hidden_size)"),
    ],
    ids=str,
)
def test_sizes_are_held_against_the_headers_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int], named: str
) -> None:
    path = tiny_checkpoint(tmp_path)
    entries = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(entries | changes))
    monkeypatch.setattr("mnemosyne.joining.checkpoint.Decoder", None)

    said = refusal(path)

    assert "must be those that its config.json describes" in said
    assert named in said
