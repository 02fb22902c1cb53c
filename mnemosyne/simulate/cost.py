"""The cost of a step: a roofline of each part of a layer at stated efficiencies.

A step takes as long as its slowest group. Within a stage products, attention and collectives
follow each other, as they do in eager execution and in a CUDA graph of one stream. Only keys that
one group hands to another travel while that one projects its own rows.
Between stages, sending a step on overlaps with the stage's next step (see ``cluster``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import EfficiencyConfig, HardwareConfig
from mnemosyne.shape import ModelShape
from mnemosyne.simulate.hardware import Link, Machine

LSE_BYTES = 4  # float32, beside the partial output of each head


@dataclass(slots=True)
class GroupLoad:
    """The load of one group in a step.

    Attributes:
        rows: through the linear layers.
        owned_rows: those of requests whose first shard is here; with a wide MLP each is sent once.
        shared_rows: those that other groups compute as well.
        handed_rows: those of other groups whose keys are handed here before attention.
        num_sampled: rows through the head.
        decode_keys: that decodes read here.
        chunks: query-key pairs and keys of each chunk of prefill here.
    """

    rows: int = 0
    owned_rows: int = 0
    shared_rows: int = 0
    handed_rows: int = 0
    num_sampled: int = 0
    decode_keys: float = 0.0
    chunks: list[tuple[float, float]] = field(default_factory=list)


@dataclass(slots=True)
class Terms:
    """A time taken apart: each entry times its constant in ``Rates`` is seconds."""

    gemm: float = 0.0  # seconds at the peak
    attention: float = 0.0
    weights: float = 0.0
    kv: float = 0.0
    links: float = 0.0
    node_messages: float = 0.0  # counts
    network_messages: float = 0.0
    layers: float = 0.0
    steps: float = 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per unit of each entry of ``Terms``."""

    gemm: float
    attention: float
    weights: float
    kv: float
    links: float
    node_messages: float
    network_messages: float
    layers: float
    steps: float

    @classmethod
    def of(cls, efficiency: EfficiencyConfig) -> Rates:
        return cls(
            gemm=1 / efficiency.gemm,
            attention=1 / efficiency.attention,
            weights=1 / efficiency.weights,
            kv=1 / efficiency.kv,
            links=1 / efficiency.links,
            node_messages=efficiency.node_latency_s,
            network_messages=efficiency.network_latency_s,
            layers=efficiency.layer_overhead_s,
            steps=efficiency.step_overhead_s,
        )

    def seconds(self, terms: Terms) -> float:
        return (
            terms.gemm * self.gemm
            + terms.attention * self.attention
            + terms.weights * self.weights
            + terms.kv * self.kv
            + terms.links * self.links
            + terms.node_messages * self.node_messages
            + terms.network_messages * self.network_messages
            + terms.layers * self.layers
            + terms.steps * self.steps
        )


class StepCost:
    """Times of the stages of a pipeline for what a step holds.

    Args:
        shape: the model.
        hardware: peaks and links.
        efficiency: what is reached of them.
        mesh: the layout.
        stages: layers of each stage.
    """

    def __init__(
        self,
        shape: ModelShape,
        hardware: HardwareConfig,
        efficiency: EfficiencyConfig,
        mesh: MeshConfig,
        stages: Sequence[int],
    ) -> None:
        self.shape = shape
        self.mesh = mesh
        self.stages = tuple(stages)
        self.rates = Rates.of(efficiency)
        self._machine = machine = Machine.of(hardware, mesh)
        local, element = shape.local(mesh), shape.weight_itemsize
        flop, byte = 1 / machine.flops_per_s, 1 / machine.bytes_per_s
        # what every row is multiplied by, and what rows ask for one by one; of an average layer
        projections = local.attention_params() + local.plain_params()
        expert = shape.expert_share * local.expert_params()
        # seconds at the peaks, per row or once per step
        self._projection_row = 2 * projections * flop
        self._projection_read = projections * element * byte
        self._mlp_row = 2 * shape.experts_per_token * expert * flop
        self._mlp_read = shape.num_experts * expert * element * byte
        self._missed = 1 - shape.experts_per_token / shape.num_experts
        self._pair = 4 * local.num_heads * shape.head_dim * flop
        self._key = local.kv_bytes_per_token(1) * byte
        vocabulary = local.vocabulary_params()
        self._head_row, self._head_read = 2 * vocabulary * flop, vocabulary * element * byte
        self._row_bytes = shape.width * element
        self._handed_bytes = local.kv_bytes_per_token(1)
        self._partial_bytes = local.num_heads * (shape.head_dim * element + LSE_BYTES)
        self._is_wide = mesh.ffn == "wide" and mesh.kvp > 1

    def stage_s(self, loads: Sequence[GroupLoad]) -> list[float]:
        """Seconds that each stage takes for a step, given the load of each group in it."""
        layer_s = max(self.rates.seconds(terms) for terms in self._layer_terms(loads))
        times = [count * layer_s + self.rates.steps for count in self.stages]
        times[0] += max(self.rates.seconds(self._embed_terms(load)) for load in loads)
        times[-1] += max(self.rates.seconds(self._head_terms(load)) for load in loads)
        return times

    def hop_s(self, loads: Sequence[GroupLoad]) -> float:
        """Seconds until the next stage has the hidden states of a step."""
        rows = max(load.rows for load in loads)
        terms = Terms(links=rows * self._row_bytes / self._machine.pp.bytes_per_s)
        _count_messages(terms, self._machine.pp, 1)
        return self.rates.seconds(terms)

    def terms(self, loads: Sequence[GroupLoad]) -> list[float]:
        """The parts of one whole pass through all stages, hops left out; in order of ``Rates``."""
        layer = max(self._layer_terms(loads), key=self.rates.seconds)
        parts = [sum(self.stages) * part for part in astuple(layer)]
        for ends in (self._embed_terms(loads[0]), self._head_terms(loads[0])):
            parts = [a + b for a, b in zip(parts, astuple(ends), strict=True)]
        parts[-1] += len(self.stages)
        return parts

    def _layer_terms(self, loads: Sequence[GroupLoad]) -> list[Terms]:
        num_sent = max(load.owned_rows for load in loads) if self._is_wide else 0
        any_shared = max(load.shared_rows for load in loads)
        parts = []
        for load in loads:
            terms = Terms(layers=1.0)
            self._add_product(terms, load.rows * self._projection_row, self._projection_read)
            self._add_handing(terms, load)
            self._add_attention(terms, load)
            self._add_all_reduce(terms, load.rows, self.mesh.tp, self._machine.tp)
            if self.mesh.kvp > 1 and any_shared:
                self._add_gather(terms, any_shared * self._partial_bytes)
            rows = load.rows
            if self._is_wide:
                self._add_gather(terms, num_sent * self._row_bytes)
                rows = self.mesh.kvp * num_sent
            read = self._mlp_read * (1 - self._missed**rows)  # experts that some row asks for
            self._add_product(terms, rows * self._mlp_row, read)
            link = self._machine.kvp if self._is_wide else self._machine.tp
            self._add_all_reduce(terms, rows, self.mesh.ffn_degree, link)
            parts.append(terms)
        return parts

    def _add_product(self, terms: Terms, compute: float, read: float) -> None:
        """A matrix product takes as long as its operations or as reading its weights."""
        if compute * self.rates.gemm >= read * self.rates.weights:
            terms.gemm += compute
        else:
            terms.weights += read

    def _add_handing(self, terms: Terms, load: GroupLoad) -> None:
        """Keys of other groups come while the own rows are projected; what is longer is waited for.

        Whoever hands rows on has the larger slice, and so is done with its projections later.
        """
        if load.handed_rows:
            link = self._machine.kvp
            message_s = load.handed_rows * self._handed_bytes / link.bytes_per_s * self.rates.links
            own_s = load.rows * self._projection_row * self.rates.gemm
            terms.links += max(0.0, message_s - own_s) / self.rates.links
            _count_messages(terms, link, 1)

    def _add_attention(self, terms: Terms, load: GroupLoad) -> None:
        """Each chunk is bound by operations or by reading its keys; decodes are read as one."""
        attention, kv = self.rates.attention, self.rates.kv
        for pairs, keys in (*load.chunks, (load.decode_keys, load.decode_keys)):
            compute, read = pairs * self._pair, keys * self._key
            if compute * attention >= read * kv:
                terms.attention += compute
            else:
                terms.kv += read

    def _add_all_reduce(self, terms: Terms, rows: int, degree: int, link: Link) -> None:
        """A ring passes ``2 (n - 1) / n`` of the data over each link."""
        if degree == 1:
            return
        volume = 2 * (degree - 1) / degree * rows * self._row_bytes
        terms.links += volume / link.bytes_per_s
        _count_messages(terms, link, 1)

    def _add_gather(self, terms: Terms, num_bytes: float) -> None:
        """Every group gets what each of the others sends."""
        link = self._machine.kvp
        terms.links += (self.mesh.kvp - 1) * num_bytes / link.bytes_per_s
        _count_messages(terms, link, 1)

    def _embed_terms(self, load: GroupLoad) -> Terms:
        terms = Terms()
        self._add_all_reduce(terms, load.rows, self.mesh.tp, self._machine.tp)
        return terms

    def _head_terms(self, load: GroupLoad) -> Terms:
        terms = Terms()
        if load.num_sampled:
            self._add_product(terms, load.num_sampled * self._head_row, self._head_read)
            if self.mesh.tp > 1:
                _count_messages(terms, self._machine.tp, 1)
        return terms


def _count_messages(terms: Terms, link: Link, count: int) -> None:
    if link.is_network:
        terms.network_messages += count
    else:
        terms.node_messages += count
