"""A model by its name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mnemosyne.joining.checkpoint import BENCH_SEED, find_checkpoint, path_on_disk, weight_bytes
from mnemosyne.model_zoo.bench import bench_spec
from mnemosyne.operators import TORCH
from mnemosyne.parallel.mesh import single_mesh
from tests.model_zoo.tiny import tiny_checkpoint


def test_the_needle_model_is_written_once_to_the_cache_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    first = find_checkpoint("needle")
    written = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    second = find_checkpoint("needle")

    assert first.path == second.path == tmp_path / "mnemosyne" / "needle"
    assert {file: file.stat().st_mtime_ns for file in second.path.iterdir()} == written
    assert second.tokenizer() is not None
    assert second.defaults().end_token_ids != ()


def test_the_bench_model_on_disk_is_written_again_once_a_file_of_it_was_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = []

    def write(path: Path, seed: int, dtype: torch.dtype) -> None:
        written.append((seed, dtype))
        tiny_checkpoint(path)

    monkeypatch.setattr("mnemosyne.joining.checkpoint.write_bench", write)
    path = path_on_disk("bench", "float32")
    assert path_on_disk("bench", "float32") == path
    assert written == [(BENCH_SEED, torch.float32)]

    (path / "model.safetensors").write_bytes(b"torn")
    path_on_disk("bench", "float32")
    path_on_disk("bench", "float32")

    assert len(written) == 2
    assert (path / "model.safetensors").stat().st_size > 4


def test_a_folder_of_the_same_name_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_checkpoint(tmp_path / "needle")
    monkeypatch.chdir(tmp_path)

    assert find_checkpoint("./needle").spec.width == 32


def test_the_bench_model_is_made_of_a_seed_and_speaks_in_ids() -> None:
    checkpoint = find_checkpoint("bench")

    assert checkpoint.spec == bench_spec()
    assert checkpoint.path is None
    assert checkpoint.tokenizer() is None
    assert checkpoint.defaults().end_token_ids == ()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_counted_before_they_are_loaded(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    checkpoint = find_checkpoint(str(tiny_checkpoint(tmp_path / "tiny", tied=tied)))
    decoder = checkpoint.decoder(single_mesh(), dtype, TORCH)

    counted = weight_bytes(decoder)
    checkpoint.load(decoder, torch.device("cpu"), None)

    assert counted == sum(parameter.nbytes for parameter in decoder.parameters())
    assert not any(parameter.is_meta for parameter in decoder.parameters())
