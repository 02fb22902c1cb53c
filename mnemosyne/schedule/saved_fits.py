"""Step times measured at an earlier start, kept in the user's cache folder for the next one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mnemosyne.schedule.predictor import NUM_FEATURES

log = logging.getLogger(__name__)

Key = Mapping[str, str]  # all that step times depend on


def fits_folder() -> Path:
    """Where fits are kept: ``mnemosyne/fits`` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mnemosyne" / "fits"


def load_fit(folder: Path, key: Key) -> np.ndarray | None:
    """The samples that were saved under a key.

    Args:
        folder: of fits.
        key: as given to ``save_fit``.

    Returns:
        float64 ``[steps, features + 1]`` for ``LinearPredictor.fit_rows``; None if there are none,
        or if the file cannot be read, which a warning tells.
    """
    path = _path(folder, key)
    try:
        rows = np.array(json.loads(path.read_text(encoding="utf-8"))["rows"], dtype=np.float64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is no saved fit (%s); step times are measured again", path, error)
        return None
    if rows.ndim != 2 or rows.shape[1] != NUM_FEATURES + 1 or not (rows[:, -1] > 0).all():
        log.warning("%s is a fit of another version; step times are measured again", path)
        return None
    return rows


def save_fit(folder: Path, key: Key, rows: np.ndarray) -> None:
    """Keep samples under a key. The file is whole or not there, whoever else writes it.

    A folder that cannot be written costs the next start a sweep, and a warning says so.

    Args:
        folder: of fits; made if need be.
        key: of the model, the machine and the layout.
        rows: float64 ``[steps, features + 1]``, seconds last.
    """
    path = _path(folder, key)
    text = json.dumps({"key": dict(key), "rows": rows.tolist()}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix=path.stem, suffix=".part", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("%s cannot be written (%s); the next start measures again", path, error)


def _path(folder: Path, key: Key) -> Path:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:16]}.json"
