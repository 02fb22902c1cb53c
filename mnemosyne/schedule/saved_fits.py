"""Step times measured at earlier starts, kept in the user's cache folder for the next one.

A file holds one line for each step of the sweep that was ever timed under its key, so it says
itself which range of chunks and contexts it covers, whatever cache and target it was made with.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnemosyne.kept import read_kept, write_kept
from mnemosyne.machine import cache_folder
from mnemosyne.schedule.calibrate import Shape
from mnemosyne.schedule.predictor import NUM_FEATURES

log = logging.getLogger(__name__)

Key = Mapping[str, str]  # all that step times depend on
Steps = dict[Shape, np.ndarray]  # of each step its features, seconds last; float64


def fits_folder() -> Path:
    """The folder of fits: ``mnemosyne/fits`` in the user's cache folder."""
    return cache_folder("fits")


def load_fit(folder: Path, key: Key) -> Steps:
    """The steps that were saved under a key.

    Args:
        folder: of fits.
        key: as given to ``save_fit``.

    Returns:
        What ``save_fit`` was given; nothing if there is no such file, or, after a warning, if it
        is not as it was written or could have been written by somebody else.
    """
    path = _path(folder, key)
    try:
        return _read(read_kept(path), key)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is no saved fit (%s); step times are measured again", path, error)
        return {}


def save_fit(folder: Path, key: Key, steps: Steps) -> None:
    """Keep steps under a key, in place of those kept before.

    A folder that cannot be written costs the next start a sweep, and a warning says so.

    Args:
        folder: of fits; made if need be.
        key: of the model, the machine and the layout.
        steps: what each took.
    """
    path = _path(folder, key)
    listed = [{"shape": shape, "row": row.tolist()} for shape, row in steps.items()]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_kept(path, json.dumps({"key": dict(key), "steps": listed}, indent=1).encode())
    except OSError as error:
        log.warning("%s cannot be written (%s); the next start measures again", path, error)


def _read(content: bytes, key: Key) -> Steps:
    """The steps in a file.

    Raises:
        ValueError: if it is of another key, or holds what no sweep measures.
    """
    found: Any = json.loads(content)
    if found["key"] != dict(key):
        raise ValueError("it is of another key")
    steps = {
        tuple(
            (int(context), int(tokens), bool(decode)) for context, tokens, decode in entry["shape"]
        ): (np.array(entry["row"], dtype=np.float64))
        for entry in found["steps"]
    }
    for row in steps.values():
        if row.shape != (NUM_FEATURES + 1,):
            raise ValueError("it is of another version")
        if not np.isfinite(row).all() or (row < 0).any() or row[-1] <= 0:
            raise ValueError("it holds times that no step takes")
    return steps


def _path(folder: Path, key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:16]}.json"
