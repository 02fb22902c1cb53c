"""Futures of an event loop that a reader may have given up."""

from __future__ import annotations

import asyncio
from typing import TypeVar

T = TypeVar("T")


def fail(future: asyncio.Future[T], error: BaseException) -> None:
    """End a future with an error, unless it was cancelled."""
    if not future.done():
        future.set_exception(error)


def fulfil(future: asyncio.Future[T], value: T) -> None:
    """End a future with its value, unless it was cancelled."""
    if not future.done():
        future.set_result(value)
