"""Bytes of a model on one rank: weights, cache, activations. Exact for what the engine loads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from mnemosyne.cache.kinds import PageKinds
from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import HardwareConfig
from mnemosyne.shape import ModelShape

LOGIT_BYTES = 4  # logits are float32


def weight_bytes(shape: ModelShape, mesh: MeshConfig, stages: tuple[int, ...]) -> int:
    """Bytes of the weights of the rank that holds most.

    Args:
        shape: the model.
        mesh: the layout.
        stages: layers of each stage of the pipeline.
    """
    local = shape.local(mesh)
    held = [count * local.layer_params() for count in stages]
    vocabulary = local.vocabulary_params()
    held[0] += vocabulary
    held[-1] += shape.width
    if not (shape.tied and len(stages) == 1):  # a tied head far from its embedding is a copy
        held[-1] += vocabulary
    return max(held) * shape.weight_itemsize


def activation_bytes(
    shape: ModelShape, mesh: MeshConfig, *, num_rows: int, num_sampled: int = 1
) -> int:
    """Most bytes that a step holds beside weights and cache.

    The peak is in the MLP (the residual stream before and after attention, the normed input,
    three buffers of the MLP's width) or in attention (the same stream, q, k and v before and
    after the rotation, the output), or it is the logits.

    Args:
        shape: the model.
        mesh: the layout.
        num_rows: tokens of the step.
        num_sampled: rows that get logits.
    """
    local = shape.local(mesh)
    widest = max(local.mlp_width * shape.experts_per_token, local.dense_width, local.shared_width)
    in_mlp = 3 * shape.width + 3 * widest
    heads = 3 * local.num_heads + 4 * local.num_kv_heads
    in_attention = 2 * shape.width + shape.head_dim * heads
    logits = num_sampled * shape.vocab_size * LOGIT_BYTES
    return max(num_rows * max(in_mlp, in_attention) * shape.weight_itemsize, logits)


@dataclass(frozen=True, slots=True)
class Footprint:
    """The use of the memory of one rank, in bytes; the rank that holds most.

    Attributes:
        weights: of its layers.
        activations: of the largest step.
        kv_per_token: K and V of one token, in all layers.
        num_pages: pages that the rest of the memory holds.
        kinds: of layers.
        num_passing: pages that no request holds; see ``PageKinds``.
    """

    weights: int
    activations: int
    kv_per_token: int
    num_pages: int
    kinds: PageKinds
    num_passing: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache of one group holds: of one request, where layers forget."""
        return self.kinds.capacity(self.num_pages)

    @property
    def kv_bytes(self) -> int:
        """The whole pool: one page more than is handed out takes what padding rows write."""
        num_pages = self.num_pages + 1 + self.num_passing
        return num_pages * self.kinds.page_size * self.kv_per_token // self.kinds.num_tracks


def footprint(
    shape: ModelShape,
    hardware: HardwareConfig,
    mesh: MeshConfig,
    stages: tuple[int, ...],
    *,
    max_rows: int,
    max_sampled: int,
    kinds: PageKinds,
    memory_share: float,
) -> Footprint:
    """How the memory of a rank is used.

    Args:
        shape: the model.
        hardware: whose memory it is.
        mesh: the layout.
        stages: layers of each stage of the pipeline.
        max_rows: tokens of the largest step.
        max_sampled: rows of it that get logits.
        kinds: of layers.
        memory_share: share of what weights and activations leave that the cache may take.
    """
    weights = weight_bytes(shape, mesh, stages)
    activations = activation_bytes(shape, mesh, num_rows=max_rows, num_sampled=max_sampled)
    page_bytes = kinds.page_size * shape.local(mesh).kv_bytes_per_token(
        _layers_per_page(shape, stages, kinds)
    )
    left = max(0, int(hardware.memory_gb * 1e9) - weights - activations)
    num_passing = kinds.num_passing(max_rows)
    num_pages = max(0, int(left * memory_share) // page_bytes - num_passing)
    kv_per_token = kinds.num_tracks * page_bytes // kinds.page_size
    return Footprint(weights, activations, kv_per_token, num_pages, kinds, num_passing)


def _layers_per_page(shape: ModelShape, stages: tuple[int, ...], kinds: PageKinds) -> int:
    """Layers of a page, on the stage where they are most."""
    stops = accumulate(stages)
    parts = (shape.windows[stop - n : stop] for n, stop in zip(stages, stops, strict=True))
    return max(kinds.layers_per_page(part) for part in parts)
