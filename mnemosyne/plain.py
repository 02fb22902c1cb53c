"""Values that a client gives as plain, bounded values of our own, or a refusal that names them.

What comes in may be of any library or class; what goes on is an int, float, str, bool, tuple or
dict that no one else can change, and that every rank can be sent.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_INT = 2**63 - 1  # the largest whole number that is sent to other ranks
NOT_LISTS = (str, bytes, bytearray, memoryview)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A whole number of any library, in a range; true and false are none."""

    low: int = 0
    high: int = MAX_INT
    rule: str  # what it must do, such as "be >= 1"
    remedy: str

    def plain(self, name: str, value: object) -> int:
        """The same number as an int.

        Raises:
            ValueError: if it is no whole number or out of the range.
        """
        if type(value) is int and self.low <= value <= self.high:
            return value  # nearly always, and the classes of numbers are slow to ask
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise refusal(name, "be a whole number", value, self.remedy)
        try:
            number = int(value)
        except Exception as error:  # code of another library
            raise refusal(name, "be a whole number", value, self.remedy) from error
        if not self.low <= number <= self.high:
            raise refusal(name, self.rule, value, self.remedy)
        return number


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A real number of any library, in a range; true and false are none."""

    low: float
    high: float
    rule: str
    remedy: str

    def plain(self, name: str, value: object) -> float:
        """The nearest float.

        Raises:
            ValueError: if it is no number, not finite or out of the range.
        """
        if isinstance(value, bool) or not isinstance(value, Real | Decimal):
            raise refusal(name, "be a number", value, self.remedy)
        try:
            number = float(value)
        except Exception as error:  # too large for a float, or code of another library
            raise refusal(name, self.rule, value, self.remedy) from error
        if not (math.isfinite(number) and self.low <= number <= self.high):
            raise refusal(name, self.rule, value, self.remedy)
        return number


def plain_flag(name: str, value: object) -> bool:
    """True or false, of Python or numpy.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise refusal(name, "be true or false", value, "write True or False")
    return bool(value)


def plain_list(name: str, value: Any, *, limit: int, of: str) -> list[Any]:
    """The items of a sequence, a set, or an array or tensor of one dimension.

    Args:
        name: of the value in errors.
        value: what the client gave.
        limit: on the number of items.
        of: what it holds, such as "token ids".

    Raises:
        ValueError: if it is none of these, or longer than ``limit``.
    """
    try:
        is_list = isinstance(value, Sequence | Set) and not isinstance(value, NOT_LISTS)
        if not (is_list or hasattr(value, "tolist")):
            raise TypeError("not a sequence")
        if len(value) > limit:
            raise refusal(name, f"hold at most {limit:,} {of}", value, "drop some")
        items = value.tolist() if hasattr(value, "tolist") else value
        return list(islice(items, limit))
    except Refusal:
        raise
    except Exception as error:  # no list, or code of another library
        raise refusal(name, f"be a list of {of}", value, f"write {name}=[...]") from error


def plain_items(name: str, value: object, *, limit: int, of: str) -> list[tuple[Any, Any]]:
    """Keys and values of a mapping of any kind.

    Args:
        name: of the value in errors.
        value: what the client gave.
        limit: on the number of entries.
        of: what it maps, such as "token ids to biases".

    Raises:
        ValueError: if it is no mapping, or has more than ``limit`` entries.
    """
    try:
        if not isinstance(value, Mapping):
            raise TypeError("not a mapping")
        if len(value) > limit:
            raise refusal(name, f"hold at most {limit:,} entries", value, "drop some")
        return [(key, value[key]) for key in islice(value, limit)]
    except Refusal:
        raise
    except Exception as error:  # no mapping, or code of another library
        raise refusal(name, f"map {of}", value, f"write {name}={{...}}") from error


def plain_text(name: str, value: object, *, limit: int, remedy: str) -> str:
    """A text that is not empty and can be written as UTF-8.

    Raises:
        ValueError: if it is no such text, or longer than ``limit`` characters.
    """
    if not isinstance(value, str) or not value:
        raise refusal(name, "hold non-empty strings", value, remedy)
    text = str.__str__(value)  # not of a class of the client's
    if len(text) > limit:
        raise refusal(name, f"hold strings of at most {limit:,} characters", text, remedy)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refusal(name, "hold valid Unicode", text, "replace lone surrogates") from error
    return text


class Refusal(ValueError):
    """A client's value that is not accepted, as ``refusal`` makes it."""


def refusal(name: str, rule: str, value: object, remedy: str) -> Refusal:
    """The error for a value that breaks its rule."""
    return Refusal(f"{name} must {rule}, got {shown(value)}; {remedy}")


def shown(value: object) -> str:
    """A short form of any value for an error, even of one that cannot show itself."""
    try:
        return re.sub(r"\s*\n\s*", " ", _SHORT.repr(value))  # a tensor shows itself in lines
    except Exception:  # noqa: BLE001  # code of another library, or a number of too many digits
        return f"a {type(value).__name__}"
