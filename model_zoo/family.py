"""Differences of families of models, as data; each has a small file that reads its entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mnemosyne.model_zoo.config import NOTHING, Config
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.router import SOFTMAX, Router

# Some ten times what any published model has, so that absurd values are refused by their name.
MAX_VOCAB, MAX_WIDTH, MAX_HEADS, MAX_LAYERS, MAX_EXPERTS = 2**24, 2**20, 2**14, 10_000, 2**14

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class Sizes(NamedTuple):
    """Sizes that all families name alike and that a family's own entries are read with."""

    num_layers: int
    width: int
    num_heads: int
    head_dim: int
    max_positions: int  # as config.json has it

    @classmethod
    def read(cls, config: Config) -> Sizes:
        """Read them.

        Raises:
            ValueError: for one that is missing or absurd.
        """
        width = config.integer("hidden_size", most=MAX_WIDTH)
        num_heads = config.integer("num_attention_heads", most=MAX_HEADS)
        return cls(
            num_layers=config.integer("num_hidden_layers", most=MAX_LAYERS),
            width=width,
            num_heads=num_heads,
            head_dim=config.integer("head_dim", width // num_heads, most=MAX_WIDTH),
            max_positions=config.integer("max_position_embeddings"),
        )


class Temperature(NamedTuple):
    """A factor on queries that grows with their position p: 1 + gain * ln(1 + (p + shift) // span).

    Sharper scores keep far contexts apart.
    """

    gain: float
    span: int
    shift: int = 0
    only_unturned: bool = False  # whether only layers that turn nothing have it


class Family(NamedTuple):
    """The choices of a family of models beyond the sizes that all of them name alike.

    Each field is one of ``ModelSpec``; the defaults are those of Llama.
    """

    windows: tuple[int | None, ...]  # one per layer; None sees everything
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"
    norms: str = "before"
    norm_offset: float = 0.0
    rope: RopeSpec | None = None  # None: as rope_theta and rope_parameters say, for all layers
    ropes: tuple[RopeSpec | None, ...] = ()
    temperature: Temperature | None = None
    score_scale: float | None = None
    activation: str | None = None  # None: as hidden_act says
    embed_scale: float = 1.0
    logit_cap: float | None = None
    mlp_width: int | None = None  # None: as intermediate_size says
    num_experts: int = 1
    experts_per_token: int = 1
    shared_width: int = 0
    dense_layers: tuple[int, ...] = ()
    dense_mlp_width: int | None = None
    has_sinks: bool = False
    chunked: bool = False
    router: Router = SOFTMAX
    gates_shared: bool = False
    names: tuple[tuple[str, str], ...] = ()
    expert_storage: str = "each"
    num_extra_layers: int = 0


class Reader(NamedTuple):
    """The reader of a family's config.json."""

    model_type: str
    read: Callable[[Config, Sizes], Family]
    defaults: Mapping[str, Any] = NOTHING  # of entries that are not there, as transformers has them
    dtype: str = "float32"  # of the weights where the file is silent


def read_activation(config: Config, entry: str) -> str:
    """The activation of the MLP's gate, as ``ModelSpec`` calls it.

    Args:
        config: the whole config.json.
        entry: the name that the family has for it.

    Raises:
        ValueError: for one that is not implemented.
    """
    named = config.value(entry, absent="silu")
    config.require(named in list(ACTIVATIONS), entry, f"be {' or '.join(ACTIVATIONS)}", named)
    return ACTIVATIONS[named]


def read_experts(config: Config) -> dict[str, Any]:
    """The number of experts and of those that a row is given to, as fields of ``Family``.

    Files call them ``num_experts``, ``num_local_experts`` or ``n_routed_experts``.

    Raises:
        ValueError: for names that do not agree, or more experts per row than there are.
    """
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    counts = {name: config.value(name) for name in names if config.value(name) is not None}
    first = next(iter(counts), names[0])
    num_experts = config.integer(first, least=2, most=MAX_EXPERTS)
    for name, count in counts.items():
        config.require(count == num_experts, name, f"agree with {first}", count)
    per_token = config.integer("num_experts_per_tok")
    config.require(
        per_token <= num_experts, "num_experts_per_tok", f"be at most {num_experts}", per_token
    )
    return {"num_experts": num_experts, "experts_per_token": per_token}


def turning_layers(config: Config, sizes: Sizes) -> list[bool]:
    """Which layers turn queries and keys, from ``no_rope_layers``, where 1 says that one does.

    Without the list, or with an empty one, each fourth does not, or each
    ``no_rope_layer_interval``-th.

    Raises:
        ValueError: for a list that does not say it of each layer.
    """
    interval = config.integer("no_rope_layer_interval", 4)
    flags = config.value("no_rope_layers")
    if not flags:
        return [(index + 1) % interval != 0 for index in range(sizes.num_layers)]
    config.require(
        isinstance(flags, list)
        and len(flags) == sizes.num_layers
        and all(flag in (0, 1) for flag in flags),
        "no_rope_layers",
        f"hold 0 or 1 for each of {sizes.num_layers} layers",
        flags,
    )
    return [bool(flag) for flag in flags]


def layer_kinds(
    config: Config,
    sizes: Sizes,
    default: Callable[[int], str],
    known: tuple[str, ...],
    rule: str | None = None,
) -> list[str]:
    """The kind of each layer, from ``layer_types``.

    Args:
        config: the whole config.json.
        sizes: how many layers there are.
        default: the kind of a layer, by its index, where the entry is absent.
        known: kinds that the family has.
        rule: says so in an error; unset: their names.

    Raises:
        ValueError: for another number of layers, or another kind.
    """
    kinds = config.value("layer_types")
    if kinds is None:
        return [default(index) for index in range(sizes.num_layers)]
    config.require(
        isinstance(kinds, list) and len(kinds) == sizes.num_layers,
        "layer_types",
        f"name the kind of each of {sizes.num_layers} layers",
        kinds,
    )
    for kind in kinds:
        config.require(kind in known, "layer_types", rule or f"hold {' or '.join(known)}", kind)
    return list(kinds)
