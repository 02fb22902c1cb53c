"""Choices of the engine over real ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mnemosyne.config import EngineConfig, MeshConfig
from mnemosyne.joining.real import _without_slices


@pytest.mark.parametrize(("device", "spread"), [("cpu", "auto"), ("meta", "off")])
def test_prompts_are_spread_on_cpus_alone(device: str, spread: str) -> None:
    config = EngineConfig(model="bench", mesh=MeshConfig(kvp=2))
    pool = SimpleNamespace(k=[torch.empty(0, device=device)])
    rank: Any = SimpleNamespace(worker=SimpleNamespace(pool=pool))

    assert _without_slices(config, rank).schedule.spread == spread
