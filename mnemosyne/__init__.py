"""Mnemosyne: exact serving of language models at contexts of millions of tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemosyne.config import (
        CacheConfig,
        EngineConfig,
        MeshConfig,
        MetricsConfig,
        ScheduleConfig,
        SloConfig,
    )
    from mnemosyne.llm import LLM
    from mnemosyne.request import Piece, RequestOutput, SamplingParams
    from mnemosyne.serve.async_engine import AsyncEngine

__all__ = [
    "LLM",
    "AsyncEngine",
    "CacheConfig",
    "EngineConfig",
    "MeshConfig",
    "MetricsConfig",
    "Piece",
    "RequestOutput",
    "SamplingParams",
    "ScheduleConfig",
    "SloConfig",
]

_HOMES = {
    "LLM": "llm",
    "AsyncEngine": "serve.async_engine",
    "Piece": "request",
    "RequestOutput": "request",
    "SamplingParams": "request",
}


def __getattr__(name: str) -> Any:
    # Names are fetched when asked for: `mnemosyne --help` and the scheduler need no torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'config')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
