"""Fields of a JSON body, looked at one by one, so that every error names its field."""

from __future__ import annotations

import warnings
from typing import Any

import msgspec
import numpy as np

from mnemosyne.plain import plain_flag, refusal, shown

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
NULL = b"null"
NUM_SHOWN = 16  # unknown names that are logged


class Fields:
    """The fields of a body that is a JSON object; each is decoded when it is asked for.

    Args:
        body: UTF-8; not copied.

    Raises:
        ValueError: if it is no JSON object.
    """

    def __init__(self, body: bytes | memoryview) -> None:
        try:
            self._raw = _OBJECT.decode(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(
                f"body must be a JSON object, got an error: {_one_line(error)}; correct it"
            ) from error
        self._known: set[str] = set()

    def raw(self, name: str) -> memoryview | None:
        """The bytes of a value; None if it is absent or null."""
        self._known.add(name)
        value = self._raw.get(name)
        if value is None:
            return None
        view = memoryview(value)
        return None if len(view) == len(NULL) and bytes(view) == NULL else view

    def get(self, name: str, default: Any = None) -> Any:
        """The value; the default if it is absent or null."""
        value = self.raw(name)
        return default if value is None else decoded(name, value)

    def flag(self, name: str, default: bool = False) -> bool:
        return plain_flag(name, self.get(name, default))

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is not None and not isinstance(value, str):
            raise refusal(name, "be a string", value, f'write "{name}": "..."')
        return value

    def whole(self, name: str, *, low: int, high: int) -> int | None:
        """A whole number in a range."""
        value = self.get(name)
        if value is None:
            return None
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not low <= value <= high:
            rule = f"be a whole number in [{low}, {high}]"
            raise refusal(name, rule, value, "change it or leave it out")
        return int(value)

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise refusal(name, "be an object", value, f'write "{name}": {{}}')
        return value

    def know(self, *names: str) -> None:
        """Accept fields that change nothing."""
        self._known.update(names)

    def unknown(self) -> list[str]:
        """Names, cut short, of the fields that were not read."""
        names = [shown(name) for name in self._raw if name not in self._known]
        return names[:NUM_SHOWN]


def decoded(name: str, value: memoryview) -> Any:
    """The value of a field.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name} must be valid JSON, got an error: {_one_line(error)}; correct it"
        ) from error


def flat_ids(name: str, value: memoryview, limit: int) -> np.ndarray:
    """The whole numbers of a flat JSON array, without an object for each.

    Args:
        name: of the field.
        value: begins with ``[``.
        limit: on how many there may be; looked at before they are read.

    Returns:
        int64; what an int64 does not hold comes out as its largest or smallest value.

    Raises:
        ValueError: if there are too many, or something else is among them.
    """
    text = bytes(value[1:-1])
    num_ids = 0 if not text.strip() else text.count(b",") + 1
    if num_ids > limit:
        raise ValueError(
            f"{name} must fit the model's {limit} positions, got {num_ids} tokens; shorten it"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ids = np.fromstring(text, dtype=np.int64, sep=",")
    except (ValueError, DeprecationWarning):
        ids = None
    if ids is None or len(ids) != num_ids:
        raise refusal(name, "be text or a flat list of token ids", decoded(name, value), "flatten")
    return ids


def _one_line(error: Exception) -> str:
    return str(error).replace("\n", " ")[:200]
