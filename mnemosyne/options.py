"""Options of the offline API: a config dataclass, or a dict of its fields."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from os import PathLike, fspath
from typing import Any, TypeVar

from mnemosyne.config import (
    CacheConfig,
    MeshConfig,
    MetricsConfig,
    ScheduleConfig,
    SloConfig,
)

Config = TypeVar("Config", MeshConfig, ScheduleConfig, SloConfig, CacheConfig, MetricsConfig)


def typed(name: str, kind: type[Config], value: Config | Mapping[str, Any] | None) -> Config:
    """The config that an option means; its fields may be paths.

    Raises:
        ValueError: if it is no config, or names a field that there is not.
    """
    if isinstance(value, kind):
        return value
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"{name} must be a {kind.__name__} or a dict of its fields, got {value!r}; "
            f"write {name}={{...}}"
        )
    fields = {k: fspath(v) if isinstance(v, PathLike) else v for k, v in (value or {}).items()}
    known = list(kind.__dataclass_fields__)
    for key in fields:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else "drop it"
            raise ValueError(
                f"{name} must have keys among {', '.join(known)}, got {key!r}; {remedy}"
            )
    return kind(**fields)
