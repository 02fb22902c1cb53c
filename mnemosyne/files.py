"""Reading what others wrote: text and JSON of a checkpoint within bounds, shown harmlessly."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

MAX_BYTES = 4 << 20  # of a file of settings; published ones hold at most a few hundred kB
MAX_DEPTH = 64  # of nesting
MAX_VALUES = 500_000  # of a file: bounds the memory of what is read
MAX_NUMBER = 1e40  # transformers writes 1e30 for "no limit"
SHOWN_CHARS = 100


def shown(value: object, limit: int = SHOWN_CHARS) -> str:
    """A value of a file as an error shows it: its repr, short, with no control character."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = limit
    short.maxlevel = 3
    return printable(short.repr(value), limit)


def printable(text: object, limit: int = 4 * SHOWN_CHARS) -> str:
    """Foreign text in one line: control characters and lone surrogates escaped, the middle cut."""
    said = str(text)
    if len(said) > limit:
        half = limit // 2
        said = f"{said[:half]}...{said[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in said)


def is_there(file: Path) -> bool:
    """Return whether there is such a file.

    Raises:
        ValueError: if something else than a file has its name, or a link that leads nowhere.
    """
    try:
        mode = file.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not file.is_symlink():
            return False
        raise _unreadable(file, "a link that leads nowhere") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise _unreadable(file, error) from error
    if not stat.S_ISREG(mode):
        raise _unreadable(file, "a directory" if stat.S_ISDIR(mode) else "a device or a pipe")
    return True


def read_bytes(file: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a file that is there.

    Raises:
        ValueError: if it cannot be read or is larger than ``max_bytes``.
    """
    try:
        # A pipe that took the place of the file in between must not keep the reader waiting.
        with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as error:
        raise _unreadable(file, error.strerror) from error
    if len(data) > max_bytes:
        raise ValueError(
            f"{printable(file)} must hold at most {max_bytes:,} bytes, got more; replace it"
        )
    return data


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """The text of a file that is there.

    Raises:
        ValueError: as ``read_bytes``, and if it is not UTF-8.
    """
    try:
        return read_bytes(file, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(file)} must be UTF-8, got {error}; replace it") from error


def read_object(file: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The entries of a JSON file; none if there is no such file.

    Raises:
        ValueError: as ``read_text`` and ``parse_object``.
    """
    return parse_object(read_text(file, max_bytes), printable(file)) if is_there(file) else {}


def parse_object(text: str, name: str) -> dict[str, Any]:
    """The entries of a JSON object.

    Args:
        text: of a file; its reader has bounded its length.
        name: of the file, for errors.

    Raises:
        ValueError: if it is no JSON object, nested beyond ``MAX_DEPTH``, has more than
            ``MAX_VALUES`` values, names an entry twice, or holds a number that is not finite or
            beyond ``MAX_NUMBER``; the entry is named.
    """
    if sum(text.count(mark) for mark in ",[{") > MAX_VALUES:
        raise ValueError(f"{name} must hold at most {MAX_VALUES:,} values, got more; replace it")
    try:
        entries = json.loads(text, object_pairs_hook=_once, parse_int=_whole)
    except RecursionError as error:
        raise _too_deep(name) from error
    except ValueError as error:
        raise ValueError(
            f"{name} must be valid JSON, got an error: {printable(error)}; download the file again"
        ) from error
    if not isinstance(entries, dict):
        raise ValueError(f"{name} must hold a JSON object, got {shown(entries)}; replace it")
    for path, value in _values(entries, name):
        if not abs(value) <= MAX_NUMBER:  # nan is not either
            raise ValueError(
                f"{path} in {name} must be finite and at most {MAX_NUMBER:g}, "
                f"got {shown(value)}; correct the file"
            )
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        for name, _ in pairs:
            if name not in entries:
                raise ValueError(f"{shown(name)} is there twice")
            del entries[name]
    return entries


def _whole(digits: str) -> float:
    return int(digits) if len(digits) < 100 else inf  # which the entry's name is told of


def _values(entries: dict[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested entries with their paths, level by level."""
    level: list[tuple[str, Any]] = [("", entries)]
    for _ in range(MAX_DEPTH):
        deeper = []
        for path, container in level:
            pairs = container.items() if isinstance(container, dict) else enumerate(container)
            for key, value in pairs:
                if isinstance(value, dict | list):
                    deeper.append((f"{path}{printable(key)}.", value))
                elif isinstance(value, int | float):
                    yield f"{path}{printable(key)}", value
        level = deeper
        if not level:
            return
    raise _too_deep(name)


def _too_deep(name: str) -> ValueError:
    return ValueError(f"{name} must be nested at most {MAX_DEPTH} deep, got more; replace it")


def _unreadable(file: Path, why: object) -> ValueError:
    return ValueError(
        f"{printable(file)} must be a file that can be read, got {printable(why)}; "
        "replace it or its permissions"
    )
