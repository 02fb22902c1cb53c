"""The faster backend by GPU, as measured: a table that the GPU suite writes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import torch

HALF_PRECISION = (torch.bfloat16, torch.float16)  # what was timed
KINDS = ("decode", "chunk")


def measured_on(device: torch.device) -> dict[str, Any] | None:
    """The measurements on GPUs of this kind, or None.

    Returns:
        By ``decode`` and ``chunk`` the faster backend, where they were compared; by ``configs``
        how the Triton kernels are fastest, the fields of a ``TileConfig`` by ``shape_key``.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    version = torch.cuda.get_device_capability(device)
    return read_table().get(".".join(map(str, version)))


def read_table() -> dict[str, Any]:
    """Measurements by compute capability, such as ``9.0``."""
    table = json.loads((files("mnemosyne") / "conf" / "attention_cuda.json").read_text())
    assert isinstance(table, dict)
    return table


def usual_on_gpu(row: dict[str, Any] | None, dtype: torch.dtype) -> tuple[dict[str, str], str]:
    """The backends that ``auto`` takes on a GPU for ``decode`` and ``chunk``, and why.

    Args:
        row: from ``measured_on``.
        dtype: of q, k and v.
    """
    if row is None or not row.keys() & set(KINDS):
        return dict.fromkeys(KINDS, "triton"), "backends were not compared on this device"
    if dtype not in HALF_PRECISION:
        return dict.fromkeys(KINDS, "triton"), f"backends were not compared in {dtype}"
    return {kind: row.get(kind, "triton") for kind in KINDS}, "measured to be the faster here"
