"""Which backend was measured to be the faster, by GPU: a table that the GPU suite writes."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import torch

HALF_PRECISION = (torch.bfloat16, torch.float16)  # what was timed


def measured_backends() -> dict[str, Any]:
    """Backend of ``decode`` and of ``chunk`` by compute capability, such as ``9.0``."""
    table = json.loads((files("mnemosyne") / "conf" / "attention_cuda.json").read_text())
    assert isinstance(table, dict)
    return table


def usual_on_gpu(
    table: dict[str, Any], capability: str | None, dtype: torch.dtype
) -> tuple[str, str]:
    """The backend that ``auto`` takes on a GPU, and why.

    One backend serves decodes and chunks: the kernels of our own are taken where they won both.

    Args:
        table: from ``measured_backends``.
        capability: of the GPU; None where there is none to ask.
        dtype: of q, k and v.
    """
    row = table.get(capability) if capability else None
    if row is None:
        return "flex", f"nothing was measured on this device (capability {capability})"
    if dtype not in HALF_PRECISION:
        return "flex", f"nothing was measured in {dtype}"
    kinds = {kind: row[kind] for kind in ("decode", "chunk")}
    name = "triton" if set(kinds.values()) == {"triton"} else "flex"
    return name, f"measured on capability {capability}: {kinds}"
