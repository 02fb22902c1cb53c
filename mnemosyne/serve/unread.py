"""Pieces of streams between two looks of their reader: one per stream, however many came."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, Protocol, TypeVar, cast

from mnemosyne.request import Logprobs


class Said(Protocol):
    """A named tuple that adds to a stream, such as ``Piece``."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def text(self) -> str: ...

    @property
    def logprobs(self) -> tuple[Logprobs, ...]: ...

    @property
    def prompt_logprobs(self) -> tuple[Logprobs | None, ...] | None: ...


T = TypeVar("T", bound=Said)


class Unread(Generic[T]):
    """Holds at most one piece per stream, bounded by what the stream may say."""

    def __init__(self) -> None:
        self._held: dict[Hashable, T | _Joined] = {}  # by stream, in the order of their coming

    def add(self, stream: Hashable, said: T) -> None:
        """Append a piece to its stream."""
        held = self._held.get(stream)
        if held is None:  # a reader that keeps up gets the piece itself
            self._held[stream] = said
        elif isinstance(held, _Joined):
            held.add(said)
        else:
            joined = self._held[stream] = _Joined()
            joined.add(held)
            joined.add(said)

    def take(self) -> list[T]:
        """Give away all that is held, one piece per stream."""
        held, self._held = self._held, {}
        return [each.whole() if isinstance(each, _Joined) else each for each in held.values()]


class _Joined:
    """Pieces of one stream; all but what adds up is that of the last one."""

    __slots__ = ("_last", "_logprobs", "_prompt_logprobs", "_texts", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: tuple[Logprobs | None, ...] | None = None

    def add(self, said: Said) -> None:
        self._last = said
        self._token_ids += said.token_ids
        if said.text:
            self._texts.append(said.text)
        self._logprobs += said.logprobs
        self._prompt_logprobs = self._prompt_logprobs or said.prompt_logprobs

    def whole(self) -> Any:
        return cast(Any, self._last)._replace(
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )
