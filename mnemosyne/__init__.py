"""Mnemosyne: exact serving of language models at contexts of millions of tokens."""

from mnemosyne.config import CacheConfig, EngineConfig, MeshConfig, MetricsConfig, ScheduleConfig
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
]
