"""Step times before any was measured, from the shape of a model and two peaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mnemosyne.cli.shapes import find_shape
from mnemosyne.config import MeshConfig
from mnemosyne.joining.roofline import REACHED, STEP_S, Peaks, expected_rates, measure_peaks
from mnemosyne.schedule.plan import Chunk, Plan
from mnemosyne.schedule.work import WorkModel
from mnemosyne.simulate.cluster import SimulatedCluster
from mnemosyne.simulate.cost import StepCost
from tests.simulate.machines import IDEAL, ROUND

PEAKS = Peaks(flops_per_s=1e14, bytes_per_s=1e12)  # as of ROUND


@pytest.mark.parametrize("name", ["llama3_8b", "qwen3_32b", "qwen3_235b_a22b"])
@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(0, 0, 4096, samples=False),
        Chunk(0, 60_000, 2048, samples=False),
        Chunk(0, 60_000, 1, samples=True, token_id=0),
    ],
)
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(tp=4)])
def test_steps_take_what_the_simulator_says_of_the_same_peaks(name, chunk, mesh):
    shape = find_shape(name)
    half = {"gemm": REACHED, "attention": REACHED, "weights": REACHED, "kv": REACHED}
    links = replace(ROUND, node_gb_per_s=1e6)
    cost = StepCost(shape, links, replace(IDEAL, **half), mesh, [shape.num_layers])
    work = WorkModel([None], unread_share=shape.unread_share()).chunk(
        chunk.start, chunk.num_tokens, samples=chunk.samples, is_decode=chunk.is_decode
    )

    expected_s = np.dot(expected_rates(shape, mesh, PEAKS), work.features())

    (simulated_s,) = cost.stage_s(SimulatedCluster(cost).loads(Plan(index=0, chunks=(chunk,))))
    # a line is the sum of what a roofline takes the larger one of
    assert simulated_s * 0.99 <= expected_s - STEP_S <= 1.3 * simulated_s


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_this_machine_has_peaks_in_every_dtype(dtype):
    peaks = measure_peaks(torch.device("cpu"), dtype)

    assert 1e8 < peaks.flops_per_s < 1e15
    assert 1e8 < peaks.bytes_per_s < 1e13
    assert min(expected_rates(find_shape("bench"), MeshConfig(), peaks)) > 0
