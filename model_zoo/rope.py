"""Rotary positions: what config.json says about them, and their angles in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mnemosyne.model_zoo.config import Config
from mnemosyne.operators import Operators, Rotary

MAX_RATIO = 1e6  # of a factor or a number of turns


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """How positions turn into angles. Fields that a kind does not name have no effect on it."""

    kind: str = "default"  # default, linear, llama3 or yarn
    theta: float
    dim: int  # rotary dims: the whole head, in two halves (pair i is dims i and i + dim / 2)
    factor: float = 1.0  # linear, llama3, yarn: how far slow pairs are stretched
    original_max_positions: int = 0  # llama3, yarn: length before stretching
    low_freq_factor: float = 1.0  # llama3: pairs with fewer turns in that length are stretched
    high_freq_factor: float = 4.0  # llama3: pairs with more turns are left alone
    beta_fast: float = 32.0  # yarn: the same two bounds, in turns
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the bounds to whole pairs
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


def read_rope(config: Config, head_dim: int, max_positions: int) -> RopeSpec:
    """Read ``rope_parameters``, or ``rope_scaling`` and ``rope_theta`` of older files.

    Args:
        config: the whole config.json.
        head_dim: D; the rotation covers all of it.
        max_positions: ``max_position_embeddings``, where the original length is not given.

    Raises:
        ValueError: for a kind that is not implemented, a missing or an unknown entry.
    """
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    config.require(
        new is None or old is None or new.same_entries(old),
        "rope_scaling",
        "agree with rope_parameters",
        config.value("rope_scaling"),
        "keep rope_parameters alone",
    )
    theta = _theta(config, 10_000.0)
    for part in (config, new or old or Config({})):
        rotated = part.number("partial_rotary_factor", 1.0)
        part.require(rotated == 1, "partial_rotary_factor", "be 1", rotated)
    rope = new or old or Config({})
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
    spec = RopeSpec(kind=kind, theta=_theta(rope, theta), dim=head_dim)
    if kind != "default":
        spec = _read_stretch(config, rope, spec, max_positions)
    rope.refuse_rest()
    return spec


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
        rope.require(high > low, "high_freq_factor", f"be above low_freq_factor {low}", high)
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


def inverse_frequencies(rope: RopeSpec, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each rotary pair, float64 [D/2], fastest first.

    Sources: Su et al. 2021, arXiv:2104.09864; linear: Chen et al. 2023, arXiv:2306.15595;
    yarn: Peng et al. 2023, arXiv:2309.00071; llama3: the Llama 3.1 release.
    """
    half = torch.arange(rope.dim // 2, dtype=torch.float64, device=device)
    radians = rope.theta ** (half * (-2 / rope.dim))
    if rope.kind == "linear":
        return radians / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions / (2 * math.pi) * radians
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = ((turns - rope.low_freq_factor) / span).clamp(0, 1)
    elif rope.kind == "yarn":
        first, last = _yarn_bounds(rope)
        kept = 1 - ((half - first) / (last - first)).clamp(0, 1)
    else:
        return radians
    return radians * (kept + (1 - kept) / rope.factor)


def _yarn_bounds(rope: RopeSpec) -> tuple[float, float]:
    """The pair where stretching begins and the one where it is complete."""

    def pair_with(turns: float) -> float:
        ratio = rope.original_max_positions / (2 * math.pi * turns)
        return rope.dim * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper clamp is dim - 1, not the last pair, in the authors' code and all checkpoints.
    first, last = max(first, 0), min(last, rope.dim - 1)
    return first, last if last != first else last + 0.001


def rotary_cos_sin(
    positions_T: Tensor, rope: RopeSpec, dtype: torch.dtype, operators: Operators
) -> Rotary:
    """Cosine and sine of every row's angles; once per step, for all layers.

    The angle is formed in float64: at position 10M a float32 one is wrong by tenths of a radian.

    Args:
        positions_T: int64 [T].
        rope: the rotation.
        dtype: dtype of the model; half precision rotates in float32.
        operators: what computes them.

    Returns:
        ``cos_TD`` and ``sin_TD``, both [T, D/2], float32 or, for a float64 model, float64.
    """
    assert positions_T.dtype == torch.int64
    radians_D = inverse_frequencies(rope, positions_T.device)
    wide = torch.promote_types(dtype, torch.float32)
    return operators.angles(positions_T, radians_D, gain=rope.attention_factor, dtype=wide)
