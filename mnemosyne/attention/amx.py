"""Attention on CPUs with AMX: the C++ kernel of ``avx512``, its products done by tiles."""

from __future__ import annotations

import torch

from mnemosyne.attention.avx512 import Avx512Backend, why_not_avx512
from mnemosyne.kernels.cpu.library import what_is_missing_for_tiles


class AmxBackend(Avx512Backend):
    """``Avx512Backend`` with other instructions, which round differently.

    Args:
        head_dim: D; its kernel is compiled on this machine's first use of it, in seconds.
    """

    name = "amx"


def why_not_amx(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this backend cannot serve a model here, None if it can."""
    return why_not_avx512(dtype, head_dim) or what_is_missing_for_tiles()
