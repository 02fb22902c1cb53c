"""Dialects of the wire: each file reads bodies to inquiries and writes events as answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mnemosyne.server.answer import Answer, Part
from mnemosyne.server.token_names import TokenNames


class Dialect(Protocol):
    """The way the server writes answers; a module with these functions is one."""

    PREFIX: str  # of ids

    @staticmethod
    def opening(answer: Answer) -> list[dict[str, Any]]:
        """Chunks that go out before anything is computed."""
        ...

    @staticmethod
    def delta(answer: Answer, part: Part, names: TokenNames) -> dict[str, Any]:
        """The chunk of an event."""
        ...

    @staticmethod
    def chunk(answer: Answer, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of a stream; without choices it is a sign of life."""
        ...

    @staticmethod
    def whole(answer: Answer, parts: Sequence[Part], names: TokenNames) -> dict[str, Any]:
        """The answer in one piece."""
        ...
