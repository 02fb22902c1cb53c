"""GPUs that our own goal takes: 10M tokens on Llama-3 8B with at most 20 ms between tokens."""

from __future__ import annotations

from dataclasses import dataclass

from runs import layout, serve_alone

from mnemosyne import cli
from mnemosyne.cli.shapes import find_shape
from mnemosyne.config_simulate import PlanConfig
from mnemosyne.joining.simulated import stages_of
from mnemosyne.simulate.planner import Rank, plan_layouts

CLUSTERS = (4, 8, 12, 16, 24, 32, 40, 48, 64, 96, 128)  # GPUs to try
CONTEXT = 10 * 2**20


@dataclass(frozen=True, slots=True)
class Goal:
    """The smallest cluster that reaches the goal; times in seconds."""

    gpus: int
    pp: int
    kvp: int
    tp: int
    planned_tbt_s: float  # while another prompt is prefilled in the smallest chunks
    tpot_s: float  # of a run, alone
    ttft_s: float  # of a run, alone


def smallest_cluster(hardware: str) -> Goal:
    """Search clusters and layouts with the planner, and run the one that it finds."""
    for gpus in CLUSTERS:
        best = plan_layouts(_config(hardware, gpus), find_shape("llama3_8b"), stages_of)[0]
        if best.rank is Rank.FITS:
            mesh = best.mesh
            assert best.tbt_s is not None
            words = [*layout(mesh.pp, mesh.kvp, mesh.tp), f"mesh.ffn={mesh.ffn}"]
            run = serve_alone("llama3_8b", CONTEXT, f"hardware={hardware}", *words, kvp=mesh.kvp)
            return Goal(gpus, mesh.pp, mesh.kvp, mesh.tp, best.tbt_s, run.tpot_s, run.ttft_s)
    raise AssertionError(f"no cluster of {hardware} up to {CLUSTERS[-1]} reaches the goal")


def _config(hardware: str, gpus: int) -> PlanConfig:
    words = [
        *("model=llama3_8b", f"hardware={hardware}", f"gpus={gpus}", f"context={CONTEXT}"),
        *("slo.tbt=20ms", "slo.ttft=1000000s", "decodes=1"),
    ]
    config = cli.config_of("plan", *words)
    assert isinstance(config, PlanConfig)
    return config
