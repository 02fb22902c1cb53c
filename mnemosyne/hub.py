"""Snapshots that Hugging Face tools have downloaded, found by their id; nothing is downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"


def is_hub_id(name: str) -> bool:
    """Return whether a name may be that of a repository, such as ``meta-llama/Llama-3.2-1B``."""
    return re.fullmatch(rf"{_NAME}/{_NAME}", name) is not None


def find_snapshot(name: str) -> Path:
    """The folder of a repository's snapshot in the cache of the Hugging Face hub.

    Args:
        name: of the repository.

    Raises:
        ValueError: if no snapshot of its main branch is there.

    Source: the layout is that of huggingface_hub: ``refs/main`` holds a commit, and the files are
        in ``snapshots/COMMIT``.
    """
    hub = hub_folder()
    folder = hub / ("models--" + name.replace("/", "--"))
    if not folder.is_dir():
        raise ValueError(
            f"model must be a directory or an id in {hub}, got {name!r}; download it first: "
            f"hf download {name}"
        )
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        commit = ""
    snapshot = folder / "snapshots" / commit
    if not re.fullmatch("[0-9a-f]{40}", commit) or not snapshot.is_dir():
        raise ValueError(
            f"model must be an id whose main branch is in {folder}, got {name!r}; download it "
            f"again, hf download {name}, or give the path of one of the snapshots there"
        )
    return snapshot


def hub_folder() -> Path:
    """The folder in which Hugging Face tools keep their downloads."""
    for variable, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if os.environ.get(variable):
            return Path(os.path.expanduser(os.environ[variable])) / below
    return Path(os.path.expanduser("~")) / ".cache" / "huggingface" / "hub"
