"""Exact attention over a paged cache: backends of one contract, and the log-sum-exp merge."""

from __future__ import annotations

import torch

from mnemosyne.attention.cpu import CpuBackend
from mnemosyne.attention.lse import merge_partials
from mnemosyne.attention.reference import ReferenceBackend
from mnemosyne.attention.segments import AttentionBackend, AttentionBatch, Segment

__all__ = ["AttentionBackend", "AttentionBatch", "Segment", "choose_backend", "merge_partials"]


def choose_backend(name: str, *, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """A backend by name; PROVISIONAL until flex is in."""
    if name == "reference":
        return ReferenceBackend()
    return CpuBackend()
