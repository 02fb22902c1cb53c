"""The angles by which layers turn queries and keys, and the factors that sharpen queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.model_zoo.family import Temperature
from mnemosyne.model_zoo.rope import RopeSpec, rotary_cos_sin
from mnemosyne.model_zoo.spec import ModelSpec
from mnemosyne.operators import Operators, Rotary

Tables = tuple[Rotary, ...]  # cosines and sines of a step, one for each way to turn


class Turns(NamedTuple):
    """The tables that turn the queries and the keys of a layer; None turns nothing."""

    q: int | None
    k: int | None


class Turn(NamedTuple):
    """One way to turn: a rotation, if any, and whether rows are multiplied by their temperature."""

    rope: RopeSpec | None
    is_tempered: bool = False


class TurnTable:
    """The ways to turn of a run of layers.

    Args:
        spec: of the model.
        layers: the layers held.
    """

    def __init__(self, spec: ModelSpec, layers: range) -> None:
        self._spec = spec
        self._ways: list[Turn] = []
        self.by_layer = {layer: self._turns(layer) for layer in layers}

    def tables(self, positions_T: Tensor, dtype: torch.dtype, operators: Operators) -> Tables:
        """Cosines and sines of a step.

        Args:
            positions_T: int64.
            dtype: of the model.
            operators: what computes them.
        """
        return tuple(self._table(way, positions_T, dtype, operators) for way in self._ways)

    def _turns(self, layer: int) -> Turns:
        rope, is_tempered = self._spec.rope_of(layer), self._spec.is_tempered(layer)
        q, k = Turn(rope, is_tempered), Turn(rope)
        return Turns(*(None if way == Turn(None) else self._index(way) for way in (q, k)))

    def _index(self, way: Turn) -> int:
        if way not in self._ways:
            self._ways.append(way)
        return self._ways.index(way)

    def _table(
        self, way: Turn, positions_T: Tensor, dtype: torch.dtype, operators: Operators
    ) -> Rotary:
        cos_TD, sin_TD = rotary_cos_sin(
            positions_T, way.rope, dtype, operators, head_dim=self._spec.head_dim
        )
        if not way.is_tempered:
            return cos_TD, sin_TD
        assert self._spec.temperature is not None
        factor_T1 = temperatures(positions_T, self._spec.temperature)[:, None].to(cos_TD.dtype)
        return cos_TD * factor_T1, sin_TD * factor_T1


def temperatures(positions_T: Tensor, temperature: Temperature) -> Tensor:
    """The factor on the queries of each row, float64."""
    steps_T = (positions_T + temperature.shift) // temperature.span
    return 1 + temperature.gain * steps_T.double().log1p()
