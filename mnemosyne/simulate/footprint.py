"""Bytes of a model on one rank: weights, cache, activations. Exact for what the engine loads."""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.config import MeshConfig
from mnemosyne.config_simulate import HardwareConfig, ShapeConfig

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_BYTES = 4  # logits are float32


def local_kv_heads(shape: ShapeConfig, mesh: MeshConfig) -> int:
    """KV heads that one rank holds; with more ranks of tp than heads, ranks hold copies."""
    return max(1, shape.num_kv_heads // mesh.tp)


def ffn_degree(mesh: MeshConfig) -> int:
    """Ranks that share the MLP."""
    return mesh.kvp * mesh.tp if mesh.ffn == "wide" else mesh.tp


def attention_params(shape: ShapeConfig, mesh: MeshConfig) -> int:
    """Weights of the four projections of a layer on one rank, biases included."""
    heads, kv_heads = shape.num_heads // mesh.tp, local_kv_heads(shape, mesh)
    weights = shape.width * shape.head_dim * (2 * heads + 2 * kv_heads)
    return weights + (shape.head_dim * (heads + 2 * kv_heads) if shape.qkv_bias else 0)


def expert_params(shape: ShapeConfig, mesh: MeshConfig) -> int:
    """Weights of one expert, or of the MLP, on one rank."""
    return 3 * shape.width * shape.mlp_width // ffn_degree(mesh)


def layer_params(shape: ShapeConfig, mesh: MeshConfig) -> int:
    """Weights of a layer on one rank."""
    router = shape.width * shape.num_experts if shape.num_experts > 1 else 0
    norms = 2 * shape.width + (2 * shape.head_dim if shape.qk_norm else 0)
    experts = shape.num_experts * expert_params(shape, mesh)
    return attention_params(shape, mesh) + experts + router + norms


def vocabulary_params(shape: ShapeConfig, mesh: MeshConfig) -> int:
    """Weights of the embedding, or of the head, on one rank."""
    return -(-shape.vocab_size // mesh.tp) * shape.width


def weight_bytes(shape: ShapeConfig, mesh: MeshConfig, stages: tuple[int, ...]) -> int:
    """Bytes of the weights of the rank that holds most.

    Args:
        shape: the model.
        mesh: the layout.
        stages: layers of each stage of the pipeline.
    """
    held = [count * layer_params(shape, mesh) for count in stages]
    vocabulary = vocabulary_params(shape, mesh)
    held[0] += vocabulary
    held[-1] += shape.width
    if not (shape.tied and len(stages) == 1):  # a tied head far from its embedding is a copy
        held[-1] += vocabulary
    return max(held) * DTYPE_BYTES[shape.dtype]


def kv_bytes_per_token(shape: ShapeConfig, mesh: MeshConfig, num_layers: int) -> int:
    """Bytes of K and V that one token takes on a rank that holds ``num_layers`` layers."""
    width = local_kv_heads(shape, mesh) * shape.head_dim
    return 2 * num_layers * width * DTYPE_BYTES[shape.dtype]


def activation_bytes(
    shape: ShapeConfig, mesh: MeshConfig, *, num_rows: int, num_sampled: int = 1
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
    element = DTYPE_BYTES[shape.dtype]
    mlp_width = shape.mlp_width * shape.experts_per_token // ffn_degree(mesh)
    heads, kv_heads = shape.num_heads // mesh.tp, local_kv_heads(shape, mesh)
    in_mlp = 3 * shape.width + 3 * mlp_width
    in_attention = 2 * shape.width + shape.head_dim * (3 * heads + 4 * kv_heads)
    logits = num_sampled * shape.vocab_size * LOGIT_BYTES
    return max(num_rows * max(in_mlp, in_attention) * element, logits)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the memory of one rank is used for, in bytes; the rank that holds most.

    Attributes:
        weights: of its layers.
        activations: of the largest step.
        kv_per_token: K and V of one token.
        num_pages: pages that the rest of the memory holds.
        page_size: tokens per page.
    """

    weights: int
    activations: int
    kv_per_token: int
    num_pages: int
    page_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache of one group holds."""
        return self.num_pages * self.page_size

    @property
    def kv_bytes(self) -> int:
        """The whole pool: one page more than is handed out takes what padding rows write."""
        return (self.num_pages + 1) * self.page_size * self.kv_per_token


def footprint(
    shape: ShapeConfig,
    hardware: HardwareConfig,
    mesh: MeshConfig,
    stages: tuple[int, ...],
    *,
    max_rows: int,
    max_sampled: int,
    page_size: int,
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
        page_size: tokens per page.
        memory_share: share of what weights and activations leave that the cache may take.
    """
    weights = weight_bytes(shape, mesh, stages)
    activations = activation_bytes(shape, mesh, num_rows=max_rows, num_sampled=max_sampled)
    token_bytes = kv_bytes_per_token(shape, mesh, max(stages))
    left = max(0, int(hardware.memory_gb * 1e9) - weights - activations)
    num_pages = int(left * memory_share) // token_bytes // page_size
    return Footprint(weights, activations, token_bytes, num_pages, page_size)
