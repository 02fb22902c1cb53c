"""Names, shapes and places of a checkpoint's tensors, from the spec alone: no module is built."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mnemosyne.model_zoo.multimodal import text_name
from mnemosyne.model_zoo.rope import RopeSpec
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.model_zoo.stored import Ones, Reordered, Shape, Source, Whole
from mnemosyne.model_zoo.stored_experts import stored_experts

# Names of the modules of a layer in the Hugging Face format, by our names.
MODULES = {
    "attn.wq": "self_attn.q_proj",
    "attn.wk": "self_attn.k_proj",
    "attn.wv": "self_attn.v_proj",
    "attn.wo": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn.sinks": "self_attn.sinks",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.router": "mlp.gate",
    "mlp.router.correction": "mlp.gate.e_score_correction_bias",
    "mlp.experts": "mlp.experts",
    "mlp.experts.gate": "mlp.experts.{}.gate_proj",
    "mlp.experts.up": "mlp.experts.{}.up_proj",
    "mlp.experts.down": "mlp.experts.{}.down_proj",
    "mlp.shared.gate": "mlp.shared_expert.gate_proj",
    "mlp.shared.up": "mlp.shared_expert.up_proj",
    "mlp.shared.down": "mlp.shared_expert.down_proj",
    "mlp.shared_gate": "mlp.shared_expert_gate",
}
# And its norms, by their place.
NORMS = {
    "before": {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "attn.post_norm": "post_attention_layernorm",
        "mlp.post_norm": "post_feedforward_layernorm",
    },
    "around": {
        "attn_norm": "input_layernorm",
        "attn.post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp.post_norm": "post_feedforward_layernorm",
    },
}
# Entries of config.json that a tensor's sizes come from, by the last part of its module.
ENTRIES = {
    "embed_tokens": "vocab_size, hidden_size",
    "lm_head": "vocab_size, hidden_size",
    "q_proj": "num_attention_heads x head_dim, hidden_size",
    "k_proj": "num_key_value_heads x head_dim, hidden_size",
    "v_proj": "num_key_value_heads x head_dim, hidden_size",
    "o_proj": "hidden_size, num_attention_heads x head_dim",
    "gate_proj": "intermediate_size, hidden_size",
    "up_proj": "intermediate_size, hidden_size",
    "down_proj": "hidden_size, intermediate_size",
}


def parameter_sources(spec: ModelSpec) -> dict[str, Source]:
    """Where every parameter of the whole model lies in a checkpoint, by our name."""
    table = Whole("model.embed_tokens.weight", (spec.vocab_size, spec.width))
    sources: dict[str, Source] = {"embed.weight": table}
    for index in range(spec.num_layers):
        prefix = f"layers.{index}."
        sources |= {prefix + name: source for name, source in _layer(spec, index)}
    sources["norm.weight"] = Whole("model.norm.weight", (spec.width,))
    head = table if spec.tied else Whole("lm_head.weight", table.shape)
    return sources | {"head.weight": head}


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Shape of every tensor of the whole model, by its Hugging Face name."""
    shapes: dict[str, Shape] = {}
    for source in parameter_sources(spec).values():
        shapes |= source.tensors()
    return shapes


def known_name(spec: ModelSpec, stored: str) -> str | None:
    """The name here of a stored tensor; None for one that the model does not use."""
    name = text_name(stored) if spec.is_text_half else stored
    extra = range(spec.num_layers, spec.num_layers + spec.num_extra_layers)
    if name is None or any(name.startswith(f"model.layers.{index}.") for index in extra):
        return None
    return name


def entries_of(name: str) -> str:
    """The names of a tensor's sizes in config.json."""
    module = name.rpartition(".")[0].rpartition(".")[2]
    return ENTRIES.get(module, "head_dim" if module in ("q_norm", "k_norm") else "hidden_size")


def _layer(spec: ModelSpec, index: int) -> Iterator[tuple[str, Source]]:
    prefix = f"model.layers.{index}."
    for module, called in NORMS[spec.norms].items():
        yield f"{module}.weight", Whole(f"{prefix}{called}.weight", (spec.width,))
    yield from _attention(spec, index, prefix)
    if spec.is_sparse(index):
        yield from _experts(spec, prefix)
    else:
        yield from _mlp(spec, prefix, "mlp", spec.dense_width)


def _called(spec: ModelSpec, module: str) -> str:
    """The name of a layer's module in the files."""
    return dict(spec.names).get(module, MODULES[module])


def _mlp(spec: ModelSpec, prefix: str, mlp: str, mlp_width: int) -> Iterator[tuple[str, Source]]:
    for module, rows, columns in (
        (f"{mlp}.gate", mlp_width, spec.width),
        (f"{mlp}.up", mlp_width, spec.width),
        (f"{mlp}.down", spec.width, mlp_width),
    ):
        name = prefix + _called(spec, module)
        yield f"{module}.weight", Whole(f"{name}.weight", (rows, columns))
        if spec.mlp_bias:
            yield f"{module}.bias", Whole(f"{name}.bias", (rows,))


def _experts(spec: ModelSpec, prefix: str) -> Iterator[tuple[str, Source]]:
    num_experts, width = spec.num_experts, spec.width
    router = prefix + _called(spec, "mlp.router")
    yield "mlp.router.weight", Whole(f"{router}.weight", (num_experts, width))
    if spec.router.is_biased:
        yield "mlp.router.bias", Whole(f"{router}.bias", (num_experts,))
    if spec.router.is_corrected:
        name = prefix + _called(spec, "mlp.router.correction")
        yield "mlp.router.correction", Whole(name, (num_experts,))
    yield from stored_experts(spec, prefix, partial(_called, spec))
    if spec.shared_width:
        yield from _mlp(spec, prefix, "mlp.shared", spec.shared_width)
    if spec.gates_shared:
        name = prefix + _called(spec, "mlp.shared_gate")
        yield "mlp.shared_gate.weight", Whole(f"{name}.weight", (1, width))


def _attention(spec: ModelSpec, index: int, prefix: str) -> Iterator[tuple[str, Source]]:
    q_width, kv_width = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    order = None if (rope := spec.rope_of(index)) is None else row_order(rope, spec.head_dim)

    def turned(name: str, shape: Shape) -> Source:
        return Whole(name, shape) if order is None else Reordered(name, shape, order)

    for module, rows, columns, has_bias, place in (
        ("attn.wq", q_width, spec.width, spec.qkv_bias, turned),
        ("attn.wk", kv_width, spec.width, spec.qkv_bias, turned),
        ("attn.wv", kv_width, spec.width, spec.qkv_bias, Whole),
        ("attn.wo", spec.width, q_width, spec.o_bias, Whole),
    ):
        name = prefix + _called(spec, module)
        yield f"{module}.weight", place(f"{name}.weight", (rows, columns))
        if has_bias:
            yield f"{module}.bias", place(f"{name}.bias", (rows,))
    if spec.has_sinks:
        name = prefix + _called(spec, "attn.sinks")
        yield "attn.sinks.weight", Whole(name, (spec.num_heads,))
    for module, width in (("attn.q_norm", q_width), ("attn.k_norm", kv_width)):
        shape = (width if spec.qk_norm_over == "row" else spec.head_dim,)
        name = f"{prefix}{_called(spec, module)}.weight"
        if spec.has_qk_norm(index):
            has_weight = spec.qk_norm_over != "head, unweighted"
            yield f"{module}.weight", turned(name, shape) if has_weight else Ones(name, shape)


def row_order(rope: RopeSpec, head_dim: int) -> tuple[int, ...] | None:
    """The order of the rows of a head in which pairs (i, i + head_dim / 2) turn together.

    Scores do not change with the order of a head's dims, as long as queries and keys share it.

    Args:
        rope: which pairs the stored order turns; the dims after them do not turn.
        head_dim: D.

    Returns:
        The stored row of each row; None if both orders are the same.
    """
    half, turning = head_dim // 2, rope.dim // 2
    step, second = (2, 1) if rope.adjacent else (1, turning)
    still = range(rope.dim, head_dim)
    order = (
        *(step * i for i in range(turning)),
        *still[: half - turning],
        *(step * i + second for i in range(turning)),
        *still[half - turning :],
    )
    return None if order == tuple(range(head_dim)) else order
