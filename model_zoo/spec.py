"""What a dense decoder is: the numbers that fix its mathematics, read from config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from mnemosyne.config import DTYPE_BYTES
from mnemosyne.model_zoo.config import NEUTRAL, Config, Family, num_layers, read_config
from mnemosyne.model_zoo.llama import llama
from mnemosyne.model_zoo.mistral import mistral
from mnemosyne.model_zoo.qwen import qwen2, qwen3
from mnemosyne.model_zoo.rope import RopeSpec, read_rope
from mnemosyne.shape import ModelShape

FAMILIES: dict[str, tuple[str, Callable[[Config], Family]]] = {
    "LlamaForCausalLM": ("llama", llama),
    "MistralForCausalLM": ("mistral", mistral),
    "Qwen2ForCausalLM": ("qwen2", qwen2),
    "Qwen3ForCausalLM": ("qwen3", qwen3),
}
# Some ten times what any published model has, so that absurd values are refused by their name.
MAX_VOCAB, MAX_WIDTH, MAX_HEADS = 2**24, 2**20, 2**14


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec(ModelShape):
    """A shape and the switches of its mathematics: RMSNorm, rotary attention, SwiGLU."""

    family: str  # llama, mistral, qwen2 or qwen3
    norm_eps: float
    rope: RopeSpec
    max_positions: int  # prompt and output together

    def __post_init__(self) -> None:
        ModelShape.__post_init__(self)
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, got {self.head_dim}; correct config.json")
        assert self.rope.dim == self.head_dim, "every dim of a head is rotated"

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
    config = Config(read_config(Path(path)))
    name, family = _family(config)
    activation = config.value("hidden_act", absent="silu")
    config.require(activation in ("silu", "swish"), "hidden_act", "be silu", activation)
    width = config.integer("hidden_size", most=MAX_WIDTH)
    num_heads = config.integer("num_attention_heads", most=MAX_HEADS)
    head_dim = config.integer("head_dim", family.head_dim or width // num_heads, most=MAX_WIDTH)
    max_positions = config.integer("max_position_embeddings")
    rope = read_rope(config, head_dim, max_positions)
    spec = ModelSpec(
        family=name,
        vocab_size=config.integer("vocab_size", most=MAX_VOCAB),
        width=width,
        num_layers=num_layers(config),
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads, most=MAX_HEADS),
        head_dim=head_dim,
        mlp_width=config.integer("intermediate_size", most=MAX_WIDTH),
        norm_eps=config.number("rms_norm_eps", 1e-6, most=1.0),
        rope=rope,
        tied=config.flag("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        o_bias=family.o_bias,
        mlp_bias=family.mlp_bias,
        qk_norm=family.qk_norm,
        windows=family.windows,
        max_positions=_reach(rope, max_positions),
        dtype=_dtype(config),
    )
    config.refuse_rest(NEUTRAL)
    return spec


def _family(config: Config) -> tuple[str, Family]:
    """The family by ``architectures``, or by ``model_type`` where the file names none."""
    model_type = config.value("model_type")
    named = [name for name, (known_type, _) in FAMILIES.items() if known_type == model_type]
    architectures = config.value("architectures") or named or [model_type]
    known = ", ".join(FAMILIES)
    config.require(
        isinstance(architectures, list)
        and len(architectures) == 1
        and architectures[0] in list(FAMILIES),  # a list compares: entries may be no keys
        "architectures",
        f"be one of {known}",
        architectures,
        "use a model of these families",
    )
    name, read_family = FAMILIES[architectures[0]]
    config.require(
        model_type in (None, name), "model_type", f"be {name} for {architectures[0]}", model_type
    )
    return name, read_family(config)


def _dtype(config: Config) -> str:
    """The dtype of the weights; float32 where the file is silent, as its readers assume."""
    new, old = config.value("dtype"), config.value("torch_dtype")
    config.require(
        not new or not old or new == old, "torch_dtype", "agree with dtype", old, "keep dtype alone"
    )
    name = new or old or "float32"
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
