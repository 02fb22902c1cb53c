"""Small machines and models for the tests of the simulator."""

from __future__ import annotations

from mnemosyne import cli
from mnemosyne.config_simulate import EfficiencyConfig, HardwareConfig, SimulateConfig
from mnemosyne.shape import ModelShape

ROUND = HardwareConfig(
    name="round",
    peak_tflops=100.0,
    memory_gb=10.0,
    memory_gb_per_s=1000.0,
    gpus_per_node=4,
    node_gb_per_s=100.0,
    network_gb_per_s=10.0,
)
IDEAL = EfficiencyConfig(
    gemm=1.0,
    attention=1.0,
    weights=1.0,
    kv=1.0,
    links=1.0,
    node_latency=0.0,
    network_latency=0.0,
    layer_overhead=0.0,
    step_overhead=0.0,
)
SMALL = ModelShape(
    num_layers=4,
    width=256,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    mlp_width=512,
    vocab_size=1000,
)


def simulate_config(*words: str, model: str = "bench") -> SimulateConfig:
    """The config that the command line makes of some words."""
    config = cli.config_of("simulate", f"model={model}", *words)
    assert isinstance(config, SimulateConfig)
    return config
