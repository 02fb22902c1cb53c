"""Values as clients write them, well meant and not: numbers, lists and objects of any library."""

from __future__ import annotations

import array
import collections
import random
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

TEXTS = ["", "a", "\n", "the river", "</s>", "\udcff", "\x00", "é" * 40, "日本", "a" * 2000]
WHOLES = [-1, 0, 1, 2, 3, 7, 16, 100, 127, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**70, -(2**63)]
REALS = [0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 5e-324, 1e-300, 1e39, 1e100, 1e306, 1e308]
ODD_REALS = [float("inf"), float("-inf"), float("nan")]


class Hostile:
    """An object that raises whatever it is asked."""

    def __len__(self) -> int:
        raise KeyError("len")

    def __iter__(self) -> Any:
        raise RuntimeError("iter")

    def __array__(self, dtype: object = None, copy: object = None) -> Any:
        raise ZeroDivisionError("array")

    def __repr__(self) -> str:
        raise OSError("repr")

    def __getitem__(self, key: object) -> Any:
        raise LookupError("item")

    def __index__(self) -> int:
        raise MemoryError("index")

    __float__ = __int__ = __index__  # type: ignore[assignment]


class HostileInt(int):
    def __int__(self) -> int:
        raise KeyError("int")

    def __repr__(self) -> str:
        raise OSError("repr")


class HostileList(collections.UserList[Any]):
    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError("item")

    def __iter__(self) -> Any:
        raise RuntimeError("iter")


class EndlessList(collections.UserList[Any]):
    def __iter__(self) -> Any:
        while True:
            yield 5


def whole(rng: random.Random, low: int, high: int) -> Any:
    """A whole number in a range, as int or of numpy."""
    value = rng.randint(low, high)
    kinds: list[Callable[[int], Any]] = [int, int, int, np.int64, np.int32, np.uint16]
    return rng.choice(kinds)(value) if 0 <= value < 2**15 else value


def real(rng: random.Random, low: float, high: float) -> Any:
    """A real number in a range, as float or of another library."""
    value = rng.uniform(low, high)
    kinds: list[Callable[[float], Any]] = [float, float, np.float64, np.float32, np.longdouble]
    kinds += [lambda x: Fraction(x).limit_denominator(100), lambda x: Decimal(repr(x)), round]
    found = rng.choice(kinds)(value)
    return found if low <= float(found) <= high else value


def listed(rng: random.Random, items: list[Any]) -> Any:
    """The items in a container of some library."""
    kinds: list[Callable[[list[Any]], Any]] = [list, list, tuple, collections.UserList]
    kinds += [collections.deque, np.array, lambda x: np.array(x, dtype=np.int32)]
    kinds += [torch.tensor, lambda x: array.array("q", x)]
    try:
        return rng.choice(kinds)(items)
    except Exception:  # noqa: BLE001  # it cannot hold them, and some items are hostile
        return items


def held(rng: random.Random, items: list[Any]) -> Any:
    """The items, of any size, in a container that takes them as they are and converts none."""
    kinds: list[Callable[[list[Any]], Any]] = [list, tuple, collections.UserList, collections.deque]
    return rng.choice(kinds)(items)


def mapped(rng: random.Random, items: dict[Any, Any]) -> Any:
    """The items in a mapping of some kind."""
    kinds: list[Callable[[dict[Any, Any]], Any]] = [dict, types.MappingProxyType]
    kinds += [collections.UserDict, collections.ChainMap, collections.OrderedDict]
    return rng.choice(kinds)(items)


def odd(rng: random.Random) -> Any:
    """Anything at all."""
    makers: list[Callable[[], Any]] = [
        lambda: None,
        lambda: rng.choice([True, False, np.True_, np.False_]),
        lambda: rng.choice(WHOLES),
        lambda: rng.choice(REALS + ODD_REALS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice([np.int8(100), np.uint64(2**64 - 1), np.longdouble(0.5), 10**400, 1j]),
        lambda: rng.choice([Decimal("nan"), Decimal("sNaN"), Fraction(1, 3), Decimal("1e999999")]),
        lambda: rng.choice([b"ab", bytearray(b"a"), memoryview(b"a")]),
        lambda: rng.choice([range(5), range(10**12), range(10**30)]),
        lambda: rng.choice([np.zeros((3, 0)), np.array(5), np.array(["a"]), np.array([True])]),
        lambda: rng.choice([torch.tensor(3), torch.tensor([0.5]), torch.ones(2, 2).long()]),
        lambda: rng.choice([[], [[]], [[], []], [None], [[[5]]], {}, set(), {5}]),
        lambda: held(rng, [odd(rng) for _ in range(rng.randint(0, 3))]),
        lambda: {rng.choice([5, True, "5", -1, 2**70, None, (1,)]): odd(rng)},
        lambda: rng.choice([Hostile(), HostileInt(3), HostileList([5]), EndlessList([5])]),
        lambda: rng.choice([object(), Hostile, lambda: 5, iter([5, 6]), types]),
        lambda: np.broadcast_to(np.int64(5), 10**12),
    ]
    return rng.choice(makers)()
