"""The link that each axis of a mesh uses, and the peaks of a rank in base units."""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import HardwareConfig


@dataclass(frozen=True, slots=True)
class Link:
    """The slowest link that an axis crosses."""

    bytes_per_s: float  # per rank, one direction, peak
    is_network: bool  # whether it leaves the node


@dataclass(frozen=True, slots=True)
class Machine:
    """The peaks of one rank, and the links that join it to others.

    Ranks lie in order, tp innermost, so that an axis stays within a node if all ranks that its
    neighbours span do.
    """

    flops_per_s: float
    bytes_per_s: float
    tp: Link
    kvp: Link
    pp: Link

    @classmethod
    def of(cls, hardware: HardwareConfig, mesh: MeshConfig) -> Machine:
        """The machine that a mesh makes of some hardware."""

        def link(span: int) -> Link:
            is_network = span > hardware.gpus_per_node
            rate = hardware.network_gb_per_s if is_network else hardware.node_gb_per_s
            return Link(rate * 1e9, is_network)

        return cls(
            flops_per_s=hardware.peak_tflops * 1e12,
            bytes_per_s=hardware.memory_gb_per_s * 1e9,
            tp=link(mesh.tp),
            kvp=link(mesh.tp * mesh.kvp),
            pp=link(mesh.world_size),
        )
