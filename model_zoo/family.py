"""What families of models differ in, as data; each has a small file that reads its own entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mnemosyne.model_zoo.config import NOTHING, Config
from mnemosyne.model_zoo.rope import RopeSpec

# Some ten times what any published model has, so that absurd values are refused by their name.
MAX_VOCAB, MAX_WIDTH, MAX_HEADS, MAX_LAYERS = 2**24, 2**20, 2**14, 10_000

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


class Family(NamedTuple):
    """What a family of models decides beyond the sizes that all of them name alike.

    Each field is one of ``ModelSpec``; the defaults are what Llama does.
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


class Reader(NamedTuple):
    """How config.json of a family is read."""

    model_type: str
    read: Callable[[Config, Sizes], Family]
    defaults: Mapping[str, Any] = NOTHING  # of entries that are not there, as transformers has them


def read_activation(config: Config, entry: str) -> str:
    """What turns the gate of the MLP, as ``ModelSpec`` calls it.

    Args:
        config: the whole config.json.
        entry: the name that the family has for it.

    Raises:
        ValueError: for one that is not implemented.
    """
    named = config.value(entry, absent="silu")
    config.require(named in list(ACTIVATIONS), entry, f"be {' or '.join(ACTIVATIONS)}", named)
    return ACTIVATIONS[named]


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
