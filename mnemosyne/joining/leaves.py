"""The folder of a cache that outlives the process, opened for one rank."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mnemosyne.cache.leaf_copies import LeafCopies
from mnemosyne.cache.leaf_file import LEAF_TOKENS, Layout, Span
from mnemosyne.cache.leaf_folder import LeafFolder
from mnemosyne.cache.leaf_storage import Storage
from mnemosyne.cache.pages import PagePool
from mnemosyne.config import CacheConfig
from mnemosyne.files import shown
from mnemosyne.joining.checkpoint import Checkpoint
from mnemosyne.joining.compute import Compute
from mnemosyne.joining.fingerprint import model_fingerprint
from mnemosyne.machine import is_private
from mnemosyne.model_zoo.stages import cut_stages
from mnemosyne.parallel.collectives import gather_counts
from mnemosyne.parallel.mesh import Mesh
from mnemosyne.runtime.leaves import RankLeaves

log = logging.getLogger(__name__)


def open_folder(path: str) -> Path:
    """The folder of ``cache.dir``, made if need be.

    Raises:
        ValueError: if it cannot be used, or other users can write to it: keys and values that
            somebody else made would be taken for those of the model.
    """
    folder = Path(os.path.expanduser(path))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_usable = os.access(folder, os.R_OK | os.W_OK | os.X_OK)
        is_ours = is_private(folder)
    except OSError as error:
        raise ValueError(
            f"cache.dir must be a folder that can be written, got {shown(path, 400)} "
            f"({error.strerror}); name another one"
        ) from error
    if not is_usable:
        raise ValueError(
            f"cache.dir must be a folder that can be written, got {shown(path, 400)}; "
            "name one of yours"
        )
    if not is_ours:
        raise ValueError(
            f"cache.dir must be a folder that no other user can write to, got "
            f"{shown(path, 400)}; chmod go-w it, or name one of yours"
        )
    return folder


def open_leaves(
    config: CacheConfig, checkpoint: Checkpoint, compute: Compute, pool: PagePool, mesh: Mesh
) -> RankLeaves | None:
    """This rank's way to the disk, None without ``cache.dir``. Every rank calls it.

    Raises:
        ValueError: if the folder cannot be used, or ranks have other weights.
    """
    if config.dir is None:
        return None
    folder, spec = open_folder(config.dir), checkpoint.spec
    kernels = f"{compute.backend.name} {compute.operators.name}"
    fingerprint = model_fingerprint(checkpoint, compute.dtype, compute.device, kernels)
    _check_alike(fingerprint, mesh)
    layout = Layout(
        model=fingerprint.hex(),
        name=checkpoint.name,
        dtype=str(compute.dtype).removeprefix("torch."),
        head_dim=spec.head_dim,
        num_layers=spec.num_layers,
        num_heads=spec.num_kv_heads,
        leaf_tokens=LEAF_TOKENS,
    )
    layers = cut_stages(spec, mesh.pp.degree)[mesh.pp.index]
    first = mesh.tp.index * spec.num_kv_heads // mesh.tp.degree
    num_heads = max(1, spec.num_kv_heads // mesh.tp.degree)
    copies = LeafCopies(pool, Span(layers[0], layers[-1] + 1), Span(first, first + num_heads))
    leaves = LeafFolder(Storage(folder), layout, int(config.dir_max_bytes))
    if mesh.rank == 0:
        log.info("cache.dir: %s", leaves.describe())
    # with more ranks of tp than heads, neighbours hold copies
    writes = mesh.tp.index == -(-first * mesh.tp.degree // spec.num_kv_heads)
    return RankLeaves(leaves, copies, group=mesh.kvp.index, writes=writes)


def _check_alike(fingerprint: bytes, mesh: Mesh) -> None:
    beginning = int.from_bytes(fingerprint[:7], "little")
    if len(set(gather_counts(beginning, mesh))) > 1:
        raise ValueError(
            "model must have the same weights on every rank where cache.dir is set, got others "
            "on some; copy the checkpoint again"
        )
