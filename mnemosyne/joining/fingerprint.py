"""The identity of a model: a digest of its weights, taken once and remembered by file."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from mnemosyne.joining.checkpoint import Checkpoint
from mnemosyne.kept import read_kept, write_kept
from mnemosyne.machine import cache_folder
from mnemosyne.model_zoo import bench

log = logging.getLogger(__name__)

TOLD_S = 1.0  # for the digests of weights, above which a line is logged


def model_fingerprint(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, kernels: str
) -> bytes:
    """A digest of all that keys and values depend on, but for how ranks share the work.

    Args:
        checkpoint: whose weights are read once, and again when their files change.
        dtype: that the model is computed in.
        device: where; weights from a seed depend on it.
        kernels: names of what computes; where rounding shows, others give other bits.
    """
    if checkpoint.path is None:
        weights: Any = [torch.__version__, inspect.getsource(bench), device.type]
    else:
        weights = _digests(checkpoint.path)
    rounded = "" if dtype == torch.float64 else kernels
    told = json.dumps([repr(checkpoint.spec), str(dtype), rounded, weights], sort_keys=True)
    return hashlib.sha256(told.encode()).digest()


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of each file of weights in a directory."""
    started_s = perf_counter()
    memory = cache_folder("digests") / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}"
    known, found = _recall(memory), {}
    for file in sorted([*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]):
        status = file.stat()
        marks = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        entry = known.get(file.name)
        if not isinstance(entry, list) or entry[:-1] != marks:
            with file.open("rb") as opened:
                entry = [*marks, hashlib.file_digest(opened, "sha256").hexdigest()]
        found[file.name] = entry
    if found != known:
        try:
            write_kept(memory, json.dumps(found).encode())
        except OSError as error:
            log.warning("%s cannot be written (%s); weights are read again", memory, error)
    if perf_counter() - started_s > TOLD_S:
        log.info("weights digested for cache.dir in %.1f s", perf_counter() - started_s)
    return {name: entry[-1] for name, entry in found.items()}


def _recall(memory: Path) -> dict[str, Any]:
    """Digests that earlier starts took, by file."""
    try:
        known = json.loads(read_kept(memory))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
