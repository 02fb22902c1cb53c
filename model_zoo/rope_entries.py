"""Rotary positions as config.json describes them, for all layers or by kind of layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from mnemosyne.model_zoo.config import Config
from mnemosyne.model_zoo.family import Sizes, layer_kinds
from mnemosyne.model_zoo.rope import RopeSpec

MAX_RATIO = 1e6  # of a factor or a number of turns
DEFAULT_THETA = 10_000.0
KINDS = ("full_attention", "sliding_attention")


def read_rope(
    config: Config,
    head_dim: int,
    max_positions: int,
    *,
    partial: bool = False,
    elsewhere: frozenset[str] = frozenset(),
) -> RopeSpec:
    """Read ``rope_parameters``, or ``rope_scaling`` and ``rope_theta`` of older files.

    Args:
        config: the whole config.json.
        head_dim: D.
        max_positions: ``max_position_embeddings``, where the original length is not given.
        partial: whether ``partial_rotary_factor`` may leave dims of a head as they are.
        elsewhere: entries of ``rope_parameters`` that the family reads itself.

    Raises:
        ValueError: for a kind that is not implemented, a missing or an unknown entry.
    """
    rope, theta = _section(config), _theta(config, DEFAULT_THETA)
    share = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    owner = rope if rope.value("partial_rotary_factor") else config
    dim = int(head_dim * share)
    if partial and config.value("rotary_dim") is not None:  # as MiniMax says it
        dim = config.integer("rotary_dim", most=head_dim)
        config.require(share in (1, dim / head_dim), "rotary_dim", f"be {head_dim * share}", dim)
    owner.require(
        dim == head_dim or (partial and 0 < dim < head_dim and dim % 2 == 0),
        "partial_rotary_factor",
        "leave an even number of dims to turn" if partial else "be 1",
        share,
    )
    spec = _read_kind(config, rope, max_positions, theta=theta, dim=dim)
    owner.require(
        dim == head_dim or spec.attention_factor == 1,
        "partial_rotary_factor",
        "be 1 where rope has an attention factor",
        share,
    )
    rope.refuse_rest(elsewhere)
    return spec


def _section(config: Config) -> Config:
    """The entries of either name, which must agree where both are there."""
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    config.require(
        new is None or old is None or new.same_entries(old),
        "rope_scaling",
        "agree with rope_parameters",
        config.value("rope_scaling"),
        "keep rope_parameters alone",
    )
    return new or old or Config({})


def _ropes_by_kind(
    config: Config, head_dim: int, max_positions: int, *, sliding_theta: float
) -> dict[str, RopeSpec]:
    """The rotation of full and of sliding layers, by what ``layer_types`` calls them.

    Args:
        config: the whole config.json. Its ``rope_parameters`` hold a section per kind; an older
            file has ``rope_theta`` and ``rope_scaling``, which are those of full layers alone.
        head_dim: D, all of which turns.
        max_positions: as for ``read_rope``.
        sliding_theta: the base of sliding layers where no section says it.

    Raises:
        ValueError: as ``read_rope`` does.
    """
    both, old = config.section("rope_parameters"), config.section("rope_scaling")
    config.require(
        both is None or old is None, "rope_scaling", "be absent beside rope_parameters", old
    )
    full, sliding = ((both.section(kind) if both else None) for kind in KINDS)
    full_theta = _theta(config, DEFAULT_THETA)
    ropes = {}
    for kind, rope, theta in zip(
        KINDS, (full or old, sliding), (full_theta, sliding_theta), strict=True
    ):
        rope = rope or Config({})
        ropes[kind] = _read_kind(config, rope, max_positions, theta=theta, dim=head_dim)
        rope.refuse_rest()
    if both:
        both.refuse_rest()
    return ropes


def full_and_sliding(
    config: Config, sizes: Sizes, *, every: int, sliding_theta: float
) -> dict[str, Any]:
    """Windows and rotations of layers of both kinds, as fields of ``Family``.

    Args:
        config: the whole config.json.
        sizes: those that all families have.
        every: one layer in so many is full, the last of them, where ``layer_types`` is absent.
        sliding_theta: as for ``_ropes_by_kind``.

    Raises:
        ValueError: as ``layer_kinds`` and ``_ropes_by_kind`` do, or for no window.
    """
    full, sliding = KINDS
    kinds = layer_kinds(
        config, sizes, lambda index: sliding if (index + 1) % every else full, KINDS
    )
    window = config.integer("sliding_window")
    ropes = _ropes_by_kind(config, sizes.head_dim, sizes.max_positions, sliding_theta=sliding_theta)
    return {
        "windows": tuple(window if kind == sliding else None for kind in kinds),
        "rope": ropes[full],
        "ropes": tuple(ropes[kind] for kind in kinds),
    }


def _read_kind(
    config: Config, rope: Config, max_positions: int, *, theta: float, dim: int
) -> RopeSpec:
    """One rotation from its own section."""
    old_kind = rope.value("type", absent="default")
    kind = rope.value("rope_type", absent=old_kind)
    rope.require(
        kind == old_kind or rope.value("type") is None, "type", "agree with rope_type", old_kind
    )
    rope.require(
        kind in ("default", "linear", "llama3", "yarn"),
        "rope_type",
        "be default, linear, llama3 or yarn",
        kind,
    )
    spec = RopeSpec(kind=kind, theta=_theta(rope, theta), dim=dim)
    return spec if kind == "default" else _read_stretch(config, rope, spec, max_positions)


def _theta(config: Config, default: float) -> float:
    theta = config.number("rope_theta", default)
    config.require(theta > 1, "rope_theta", "be above 1", theta)  # yarn divides by its logarithm
    return theta


def _ratio(rope: Config, name: str, default: float | None = None) -> float:
    """A factor or a number of turns, in a range that keeps all that is made of it finite."""
    return rope.number(name, default, least=1 / MAX_RATIO, most=MAX_RATIO)


def _read_stretch(config: Config, rope: Config, spec: RopeSpec, max_positions: int) -> RopeSpec:
    """Add the fields of the kinds that stretch positions."""
    if spec.kind == "linear":
        return replace(spec, factor=_ratio(rope, "factor"))
    original = rope.integer("original_max_position_embeddings", max_positions)
    original = config.integer("original_max_position_embeddings", original)
    if spec.kind == "llama3":
        low, high = _ratio(rope, "low_freq_factor"), _ratio(rope, "high_freq_factor")
        rope.require(high >= low, "high_freq_factor", f"be at least low_freq_factor {low}", high)
        return replace(
            spec,
            factor=_ratio(rope, "factor"),
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = _ratio(rope, "factor", max_positions / original)
    return replace(
        spec,
        factor=factor,
        original_max_positions=original,
        beta_fast=_ratio(rope, "beta_fast", 32.0),
        beta_slow=_ratio(rope, "beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=_attention_factor(rope, factor),
    )


def _attention_factor(rope: Config, factor: float) -> float:
    """YaRN's gain on cos and sin: given, or 0.1 ln(factor) + 1 and its two-scale form."""
    mscale, mscale_all_dim = rope.value("mscale"), rope.value("mscale_all_dim")
    log_factor = math.log(max(factor, 1.0))
    gain = 0.1 * log_factor + 1.0
    if mscale and mscale_all_dim:
        scales = _ratio(rope, "mscale"), _ratio(rope, "mscale_all_dim")
        gain = (0.1 * scales[0] * log_factor + 1.0) / (0.1 * scales[1] * log_factor + 1.0)
    return _ratio(rope, "attention_factor", gain)
