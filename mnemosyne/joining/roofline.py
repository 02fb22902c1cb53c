"""Predicted step times by roofline: operations and bytes at the peaks measured here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mnemosyne.config import MeshConfig
from mnemosyne.shape import ModelShape

REACHED = 0.5  # share of the peaks that a whole step reaches
STEP_S = 2e-3  # of a step, whatever it does
SEQUENCE_S = 2e-5  # of each sequence in it
REPEATS = 3  # the best counts: a peak is what nothing disturbed
READ_BYTES = 32 << 20
PRODUCTS = {"cpu": (256, 1024, 1024), "cuda": (4096, 4096, 4096)}  # rows, inner size, columns


@dataclass(frozen=True, slots=True)
class Peaks:
    """Measured peaks of one rank."""

    flops_per_s: float  # of a matrix product
    bytes_per_s: float  # of a read


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Time a product and a read, a tenth of a second together."""
    rows, inner, columns = PRODUCTS[device.type]
    a = torch.ones(rows, inner, dtype=dtype, device=device)
    b = torch.ones(columns, inner, dtype=dtype, device=device)
    data = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    product_s = _best_s(lambda: a @ b.T, device)
    read_s = _best_s(data.sum, device)
    return Peaks(2 * rows * inner * columns / product_s, READ_BYTES / read_s)


def expected_rates(shape: ModelShape, mesh: MeshConfig, peaks: Peaks) -> tuple[float, ...]:
    """Seconds per unit of each feature of ``StepWork.features``, through all stages.

    Args:
        shape: the whole model.
        mesh: the layout.
        peaks: of one rank.

    Returns:
        Positive rates, in the order of the features: a step, a row, a query-key pair, a key that
        a decode reads, a sequence, a row that is sampled, a row that groups exchange, all experts.
    """
    flop_s, byte_s = 1 / peaks.flops_per_s / REACHED, 1 / peaks.bytes_per_s / REACHED
    local, layers = shape.local(mesh), shape.num_layers
    params = layers * local.layer_params()
    experts = layers * shape.expert_share * local.num_experts * local.expert_params()
    unread_share = shape.unread_share()
    chosen = experts if unread_share < 1 else 0  # weights that are read as rows ask for them
    heads = layers * local.num_heads
    partial_bytes = heads * (local.head_dim * local.weight_itemsize + 4)
    return (
        STEP_S + (params - chosen + local.vocabulary_params()) * local.weight_itemsize * byte_s,
        2 * (params - unread_share * chosen) * flop_s,
        4 * heads * local.head_dim * flop_s,
        local.kv_bytes_per_token() * byte_s,
        SEQUENCE_S,
        2 * local.vocabulary_params() * flop_s,
        2 * partial_bytes * byte_s,
        experts * local.weight_itemsize * byte_s,
    )


def _best_s(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    seconds = []
    for _ in range(1 + REPEATS):
        started_s = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_s)
    return max(min(seconds[1:]), 1e-9)
