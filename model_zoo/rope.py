"""Rotary positions: from a position to angles, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemosyne.operators import Operators, Rotary


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """The way from positions to angles. Fields that a kind does not name have no effect on it."""

    kind: str = "default"  # default, linear, llama3 or yarn
    theta: float
    dim: int  # dims that turn, the first of a head; those after them do not
    adjacent: bool = False  # pair i is dims 2i and 2i + 1; else dims i and i + dim / 2
    factor: float = 1.0  # linear, llama3, yarn: the factor by which slow pairs are stretched
    original_max_positions: int = 0  # llama3, yarn: length before stretching
    low_freq_factor: float = 1.0  # llama3: pairs with fewer turns in that length are stretched
    high_freq_factor: float = 4.0  # llama3: pairs with as many turns or more are left alone
    beta_fast: float = 32.0  # yarn: the same two bounds, in turns
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the bounds to whole pairs
    attention_factor: float = 1.0  # yarn: multiplies cos and sin


def inverse_frequencies(rope: RopeSpec, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each pair that turns, float64, fastest first.

    Sources: Su et al. 2021, arXiv:2104.09864; linear: Chen et al. 2023, arXiv:2306.15595;
    yarn: Peng et al. 2023, arXiv:2309.00071; llama3: the Llama 3.1 release.
    """
    half = torch.arange(rope.dim // 2, dtype=torch.float64, device=device)
    radians = rope.theta ** (half * (-2 / rope.dim))
    if rope.kind == "linear":
        return radians / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_positions / (2 * math.pi) * radians
        # where both bounds are one no pair lies between them, and 0 / 0 is above them
        span = rope.high_freq_factor - rope.low_freq_factor
        kept = ((turns - rope.low_freq_factor) / span).nan_to_num(1.0).clamp(0, 1)
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
    positions_T: Tensor,
    rope: RopeSpec | None,
    dtype: torch.dtype,
    operators: Operators,
    *,
    head_dim: int | None = None,
) -> Rotary:
    """Cosine and sine of every row's angles; once per step, for all layers that turn alike.

    The angle is formed in float64: at position 10M a float32 one is wrong by tenths of a radian.

    Args:
        positions_T: int64 [T].
        rope: the rotation; None is one by 0.
        dtype: dtype of the model; half precision rotates in float32.
        operators: what computes them.
        head_dim: D, where some of its dims do not turn; unset: all do.

    Returns:
        ``cos_TD`` and ``sin_TD``, both [T, D/2], float32 or, for a float64 model, float64.
    """
    assert positions_T.dtype == torch.int64
    wide, gain = torch.promote_types(dtype, torch.float32), 1.0
    radians_D = torch.empty(0, dtype=torch.float64, device=positions_T.device)
    if rope is not None:
        radians_D, gain = inverse_frequencies(rope, positions_T.device), rope.attention_factor
    still = (head_dim or 2 * len(radians_D)) // 2 - len(radians_D)
    assert not still or gain == 1, "a gain on dims that do not turn"
    # angles of 0 keep the other dims as they are
    radians_D = torch.cat((radians_D, radians_D.new_zeros(still)))
    return operators.angles(positions_T, radians_D, gain=gain, dtype=wide)
