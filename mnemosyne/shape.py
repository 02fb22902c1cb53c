"""A model's shape: every size that decides its bytes and operations, known before torch is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from mnemosyne.config import DTYPE_BYTES, MeshConfig, check_positive, check_types


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """Sizes of a decoder, whole or as one rank holds them (see ``local``).

    Loading, mesh checks, capacity, the planner and the simulator all read this one description;
    ``model_zoo.spec.ModelSpec`` adds the switches of the mathematics, ``conf/shape`` holds
    published shapes by name.

    Raises:
        ValueError: naming the first size that breaks its rule.
    """

    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int  # of one expert where there are several
    vocab_size: int
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation
    num_experts: int = 1
    experts_per_token: int = 1
    shared_width: int = 0  # of the MLP that every row is given to beside its experts
    dense_layers: tuple[int, ...] = ()  # those without experts, where others have them
    dense_mlp_width: int | None = None  # of theirs; None: mlp_width
    # per layer: w sees keys above p - w, None all up to p; empty: every layer sees everything
    windows: tuple[int | None, ...] = ()
    dtype: str = "bfloat16"  # of the weights, by its torch name
    cache_dtype: str | None = None  # of K and V; None: as the weights

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        names = (*sizes, "vocab_size", "num_experts", "experts_per_token")
        check_positive(self, names, "", "the config.json of the model has it")
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"be a multiple of num_kv_heads {self.num_kv_heads}",
        )
        self._require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            f"be at most num_experts {self.num_experts}",
        )
        self._require(
            len(self.windows) == self.num_layers,
            "windows",
            f"hold one entry for each of {self.num_layers} layers",
        )
        self._require(self.dtype in DTYPE_BYTES, "dtype", f"be one of {', '.join(DTYPE_BYTES)}")
        self._require(
            self.cache_dtype is None or self.cache_dtype in DTYPE_BYTES,
            "cache_dtype",
            f"be null or one of {', '.join(DTYPE_BYTES)}",
        )

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"{name} must {rule}, got {value!r}; correct config.json")

    def local(self, mesh: MeshConfig) -> Self:
        """The shape of the layers that one rank of a mesh holds.

        Heads and words of the vocabulary are cut over tp, the MLP over tp or, with
        ``mesh.ffn=wide``, over kvp as well. With more ranks of tp than KV heads, neighbouring
        ranks hold copies of one. It is the rank that holds most: the last shard of the vocabulary
        may be shorter, and biases added after a sum over ranks lie on the first one alone.

        Args:
            mesh: degrees that ``check_mesh`` found to fit the model.
        """
        return replace(
            self,
            num_heads=self.num_heads // mesh.tp,
            num_kv_heads=max(1, self.num_kv_heads // mesh.tp),
            mlp_width=self.mlp_width // mesh.ffn_degree,
            shared_width=self.shared_width // mesh.ffn_degree,
            dense_mlp_width=self.dense_width // mesh.ffn_degree,
            vocab_size=-(-self.vocab_size // mesh.tp),
        )

    @property
    def dense_width(self) -> int:
        """Width of the MLP of layers without experts."""
        return self.mlp_width if self.dense_mlp_width is None else self.dense_mlp_width

    def is_sparse(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return self.num_experts > 1 and layer not in self.dense_layers

    @property
    def weight_itemsize(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def cache_itemsize(self) -> int:
        """Bytes of one element of K or V."""
        return DTYPE_BYTES[self.cache_dtype or self.dtype]

    def attention_params(self) -> int:
        """Weights of the four projections of a layer, biases included."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = (q_width + 2 * kv_width if self.qkv_bias else 0) + self.o_bias * self.width
        return self.width * (2 * q_width + 2 * kv_width) + biases

    def expert_params(self) -> int:
        """Weights of one expert, or of the MLP, biases included."""
        return 3 * self.width * self.mlp_width + self.mlp_bias * (2 * self.mlp_width + self.width)

    @property
    def expert_share(self) -> float:
        """Share of the layers that have experts; 1 where each has one MLP, its only expert."""
        return 1 - len(self.dense_layers) / self.num_layers

    def plain_params(self) -> float:
        """Weights of the MLPs beside experts and instead of them, of an average layer."""
        shared = self.expert_share * self.shared_width
        return 3 * self.width * (shared + (1 - self.expert_share) * self.dense_width)

    def layer_params(self) -> int:
        """Weights of an average layer: projections, experts, other MLPs, router and norms."""
        router = self.width * self.num_experts if self.num_experts > 1 else 0
        norms = 2 * self.width + (2 * self.head_dim if self.qk_norm else 0)
        experts = self.expert_share * (self.num_experts * self.expert_params() + router)
        return round(self.attention_params() + experts + self.plain_params() + norms)

    def unread_share(self) -> float:
        """Share of the experts that one row does not ask for; 1 where each row asks for all."""
        share = 1 - self.experts_per_token / self.num_experts
        return share if share > 0 else 1.0

    def vocabulary_params(self) -> int:
        """Weights of the embedding, or of the head."""
        return self.vocab_size * self.width

    def kv_bytes_per_token(self, num_layers: int | None = None) -> int:
        """Bytes of K and V that one token takes.

        Args:
            num_layers: layers that hold it; None is all.
        """
        layers = self.num_layers if num_layers is None else num_layers
        return 2 * layers * self.num_kv_heads * self.head_dim * self.cache_itemsize
