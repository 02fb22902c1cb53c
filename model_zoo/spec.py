"""The specification of a decoder: the numbers that fix its mathematics, read from config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mnemosyne.attention.chunked import Chunked, Reach
from mnemosyne.config import DTYPE_BYTES
from mnemosyne.model_zoo.config import NEUTRAL, Config, read_config
from mnemosyne.model_zoo.families import FAMILIES
from mnemosyne.model_zoo.family import (
    MAX_HEADS,
    MAX_VOCAB,
    MAX_WIDTH,
    Reader,
    Sizes,
    Temperature,
    read_activation,
)
from mnemosyne.model_zoo.multimodal import WHOLES, text_entries
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.rope_entries import read_rope
from mnemosyne.model_zoo.router import SOFTMAX, Router
from mnemosyne.shape import ModelShape


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(ModelShape):
    """A shape and the switches of its mathematics; the defaults are those of Llama.

    A family is nothing but values of these fields: no code that computes asks for its name.
    """

    family: str  # as config.json calls it
    norm_eps: float
    rope: RopeSpec  # of most layers
    max_positions: int  # prompt and output together
    # of each layer, None turns nothing; empty: every layer as `rope`
    ropes: tuple[RopeSpec | None, ...] = ()
    temperature: Temperature | None = None  # of queries, by position
    score_scale: float | None = None  # factor on scores; None: 1 / sqrt(head_dim)
    norms: str = "before"  # where attention and MLP are normed: before, after or around
    norm_offset: float = 0.0  # added to the weights of norms
    # the extent of the norm of q and k: "head", "row" or, where layers turn, "head, unweighted"
    qk_norm_over: str = "head"
    activation: str = "silu"  # see `operators.activate`
    embed_scale: float = 1.0  # factor on embeddings, rounded to the dtype of the weights
    logit_cap: float | None = None  # c of c * tanh(logits / c)
    has_sinks: bool = False  # whether each head has a logit that takes attention and gives nothing
    chunked: bool = False  # whether `windows` holds sizes of chunks, see `Chunked`
    router: Router = SOFTMAX  # the choice of experts
    gates_shared: bool = False  # whether the shared MLP is multiplied by a gate of its own
    # names of modules in the files, where they differ from Llama's; see `tensors.MODULES`
    names: tuple[tuple[str, str], ...] = ()
    expert_storage: str = "each"  # the layout of experts in the files, see `tensors`
    num_extra_layers: int = 0  # after the last, which only predict further tokens
    is_text_half: bool = False  # whether the files hold a vision or audio half as well

    def __post_init__(self) -> None:
        ModelShape.__post_init__(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}; correct config.json")
        self._require(
            len(self.ropes) in (0, self.num_layers),
            "ropes",
            f"hold one entry for each of {self.num_layers} layers, or none",
        )
        assert all(rope is None or rope.dim <= self.head_dim for rope in (self.rope, *self.ropes))

    @property
    def is_static(self) -> bool:
        """Return whether decodes can be recorded at all.

        Those of experts cannot: which products there are depends on earlier results. Nor can those
        of chunks, because what is recorded has one table of rows for each window.
        """
        return self.num_experts == 1 and not self.chunked

    @property
    def is_recordable(self) -> bool:
        """Return whether all of its operators are calls of C++ kernels, each step the same ones."""
        return (
            self.is_static
            and self.activation == "silu"
            and self.embed_scale == 1
            and self.temperature is None
            and not self.has_sinks
        )

    @property
    def scale_of_scores(self) -> float:
        """The factor on scores."""
        return self.head_dim**-0.5 if self.score_scale is None else self.score_scale

    def rope_of(self, layer: int) -> RopeSpec | None:
        """The rotation of a layer's queries and keys, None if it has none."""
        return self.ropes[layer] if self.ropes else self.rope

    def has_qk_norm(self, layer: int) -> bool:
        """Return whether a layer norms its queries and keys."""
        turns = self.rope_of(layer) is not None
        return self.qk_norm and (turns or self.qk_norm_over != "head, unweighted")

    def is_tempered(self, layer: int) -> bool:
        """Return whether a layer multiplies its queries by their temperature."""
        if self.temperature is None:
            return False
        return not self.temperature.only_unturned or self.rope_of(layer) is None

    @property
    def reaches(self) -> tuple[Reach, ...]:
        """The reach of each layer."""
        if not self.chunked:
            return self.windows
        return tuple(None if size is None else Chunked(size) for size in self.windows)

    @property
    def shape(self) -> ModelShape:
        """The sizes alone."""
        return ModelShape(**{f.name: getattr(self, f.name) for f in fields(ModelShape)})


def read_spec(path: Path | str) -> ModelSpec:
    """Read the config.json of a Hugging Face checkpoint; no weight is touched.

    Args:
        path: the directory.

    Raises:
        ValueError: if there is no checkpoint at ``path``, its architecture is unknown, or an
            entry of config.json that changes the mathematics is not implemented.
    """
    entries: Mapping[str, Any] = read_config(Path(path))
    is_half = _is_multimodal(entries)
    if is_half:
        model_types = {name: reader.model_type for name, reader in FAMILIES.items()}
        entries = text_entries(entries, model_types)
    reader = _reader(Config(entries))
    config = Config(entries, section="text_config." if is_half else "", absent=reader.defaults)
    sizes = Sizes.read(config)
    family = reader.read(config, sizes)
    rope = family.rope or read_rope(config, sizes.head_dim, sizes.max_positions)
    mlp_width = family.mlp_width or config.integer("intermediate_size", most=MAX_WIDTH)
    activation = family.activation or read_activation(config, "hidden_act")
    spec = ModelSpec(
        family=reader.model_type,
        is_text_half=is_half,
        vocab_size=config.integer("vocab_size", most=MAX_VOCAB),
        width=sizes.width,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=config.integer("num_key_value_heads", sizes.num_heads, most=MAX_HEADS),
        head_dim=sizes.head_dim,
        norm_eps=config.number("rms_norm_eps", 1e-6, most=1.0),
        tied=config.flag("tie_word_embeddings", False),
        max_positions=sizes.max_positions if family.ropes else _reach(rope, sizes.max_positions),
        dtype=_dtype(config, reader.dtype),
        **(family._asdict() | {"rope": rope, "activation": activation, "mlp_width": mlp_width}),
    )
    config.refuse_rest(NEUTRAL | {"architectures", "model_type"})
    return spec


def _named(architectures: Iterable[str], ending: str) -> str:
    """Architectures that end alike, short enough for a message."""
    return f"{', '.join(name.removesuffix(ending) for name in architectures)} with {ending}"


def _is_multimodal(entries: Mapping[str, Any]) -> bool:
    named = entries.get("architectures")
    return isinstance(named, list) and len(named) == 1 and named[0] in list(WHOLES)


def _reader(config: Config) -> Reader:
    """The family by ``architectures``, or by ``model_type`` where the file names none."""
    model_type = config.value("model_type")
    named = [name for name, known in FAMILIES.items() if known.model_type == model_type]
    architectures = config.value("architectures") or named or [model_type]
    config.require(
        isinstance(architectures, list)
        and len(architectures) == 1
        and architectures[0] in list(FAMILIES),  # a list compares: entries may be no keys
        "architectures",
        f"be one of {_named(FAMILIES, 'ForCausalLM')}, "
        f"or of {_named(WHOLES, 'ForConditionalGeneration')}",
        architectures,
        "use a model of these families",
    )
    reader = FAMILIES[architectures[0]]
    config.require(
        model_type in (None, reader.model_type),
        "model_type",
        f"be {reader.model_type} for {architectures[0]}",
        model_type,
    )
    return reader


def _dtype(config: Config, silent: str) -> str:
    """The dtype of the weights.

    Args:
        config: the whole config.json.
        silent: what it is where the file does not say it.
    """
    new, old = config.value("dtype"), config.value("torch_dtype")
    config.require(
        not new or not old or new == old, "torch_dtype", "agree with dtype", old, "keep dtype alone"
    )
    name = new or old or silent
    is_known = isinstance(name, str) and name in DTYPE_BYTES
    config.require(is_known, "dtype", f"be one of {', '.join(DTYPE_BYTES)}", name)
    return str(name)


def _reach(rope: RopeSpec, max_positions: int) -> int:
    """Positions the model can use: files keep the length before linear or yarn stretching."""
    if rope.kind == "linear":
        return max(max_positions, int(max_positions * rope.factor))
    if rope.kind == "yarn":
        return max(max_positions, int(rope.original_max_positions * rope.factor))
    return max_positions
