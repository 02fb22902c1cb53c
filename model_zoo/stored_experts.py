"""The layout of a layer's experts in the files: one by one, as stacks, or packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.model_zoo.stored import Mxfp4, Source, Stack, Strided, Whole

Called = Callable[[str], str]


def stored_experts(spec: ModelSpec, prefix: str, called: Called) -> Iterator[tuple[str, Source]]:
    """Sources of the experts of one layer, by our names.

    Args:
        spec: of the model.
        prefix: of the layer in the files.
        called: what the files call a module.
    """
    stores = {"each": _each, "halves": _stacked, "in turns": _stacked, "mxfp4": _packed}
    yield from stores[spec.expert_storage](spec, prefix, called)
    if spec.mlp_bias:
        yield from _biases(spec, prefix + called("mlp.experts"))


def _each(spec: ModelSpec, prefix: str, called: Called) -> Iterator[tuple[str, Source]]:
    wide, narrow = (spec.mlp_width, spec.width), (spec.width, spec.mlp_width)
    for module, shape in (("gate", wide), ("up", wide), ("down", narrow)):
        name = f"{prefix}{called(f'mlp.experts.{module}')}.weight"
        parts = (Whole(name.format(expert), shape) for expert in range(spec.num_experts))
        yield f"mlp.experts.{module}", Stack(name, tuple(parts))


def _stacked(spec: ModelSpec, prefix: str, called: Called) -> Iterator[tuple[str, Source]]:
    """Stacks with inputs before outputs, gate and up in one."""
    num, wide, width = spec.num_experts, spec.mlp_width, spec.width
    name = prefix + called("mlp.experts")
    for module, start, step in _gate_and_up(spec):
        yield (
            f"mlp.experts.{module}",
            Strided(
                f"{name}.gate_up_proj",
                (num, wide, width),
                (num, width, 2 * wide),
                start=start,
                step=step,
                is_transposed=True,
            ),
        )
    down = Strided(f"{name}.down_proj", (num, width, wide), (num, wide, width), is_transposed=True)
    yield "mlp.experts.down", down


def _packed(spec: ModelSpec, prefix: str, called: Called) -> Iterator[tuple[str, Source]]:
    """Stacks of 4-bit numbers with outputs before inputs, gate and up in turns."""
    num, wide, width = spec.num_experts, spec.mlp_width, spec.width
    name = prefix + called("mlp.experts")
    for module, start, step in _gate_and_up(spec):
        packed = Mxfp4(f"{name}.gate_up_proj", (num, wide, width), 2 * wide, start, step)
        yield f"mlp.experts.{module}", packed
    yield "mlp.experts.down", Mxfp4(f"{name}.down_proj", (num, width, wide), width)


def _biases(spec: ModelSpec, name: str) -> Iterator[tuple[str, Source]]:
    num, wide, width = spec.num_experts, spec.mlp_width, spec.width
    for module, start, step in _gate_and_up(spec):
        stored = Strided(f"{name}.gate_up_proj_bias", (num, wide), (num, 2 * wide), start, step)
        yield f"mlp.experts.{module}_bias", stored
    yield "mlp.experts.down_bias", Whole(f"{name}.down_proj_bias", (num, width))


def _gate_and_up(spec: ModelSpec) -> tuple[tuple[str, int, int], tuple[str, int, int]]:
    """The first of each among the outputs of both, and the distance to its next one."""
    if spec.expert_storage == "halves":
        return ("gate", 0, 1), ("up", spec.mlp_width, 1)
    return ("gate", 0, 2), ("up", 1, 2)
