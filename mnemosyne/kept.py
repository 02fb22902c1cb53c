"""Files that this program wrote for its own later starts: whole, ours and unchanged, or made again.

Each ends with a digest of its bytes. Nothing is read from a file that another user could write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mnemosyne.machine import is_private

log = logging.getLogger(__name__)

SEAL = "kept.json"  # of a folder: its recipe, and the digest of each of its files


def read_kept(path: Path) -> bytes:
    """The content of a file that ``write_kept`` wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not as it was written, or others can write to it; saying which.
        OSError: if it cannot be read.
    """
    if not is_private(path):
        raise ValueError("other users can write to it")
    content, _, digest = path.read_bytes().rpartition(b"\n")
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("it is not as it was written")
    return content


def write_kept(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there, also if others write it or power fails.

    Raises:
        OSError: if it cannot be written.
    """
    digest = hashlib.sha256(content).hexdigest().encode()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.stem}-") as scratch:
        part = Path(scratch) / "part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            file.write(content + b"\n" + digest)
            file.flush()
            os.fsync(descriptor)
        os.replace(part, path)


def kept_folder(path: Path, recipe: str, write: Callable[[Path], object]) -> Path:
    """A folder of files that are made here, once; made again if anything in it has changed.

    Args:
        path: of the folder.
        recipe: all that its content depends on.
        write: makes the folder that it is given, and the files in it.

    Returns:
        ``path``.

    Raises:
        OSError: if it cannot be made.
    """
    damage = _damage(path, recipe)
    if damage is None:
        return path
    if path.exists():
        log.warning("%s is made again: %s", path, damage)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}-") as scratch:
        made = Path(scratch) / "made"
        write(made)
        digests = {file.name: _digest(file) for file in sorted(made.iterdir())}
        seal = {"recipe": recipe, "files": digests}
        write_kept(made / SEAL, json.dumps(seal, indent=1).encode())
        _put(made, path, Path(scratch) / "old", lambda: _damage(path, recipe) is None)
    return path


def _put(made: Path, path: Path, old: Path, is_whole: Callable[[], bool]) -> None:
    """Move a folder to its place; what lies there goes to ``old``, or stays if it is as good."""
    try:
        os.rename(made, path)  # replaces an empty folder, fails on a filled one
    except OSError:
        if is_whole():
            return  # another process was faster
        shutil.move(path, old)
        os.rename(made, path)


def _damage(path: Path, recipe: str) -> str | None:
    """The damage to a folder that ``kept_folder`` made, None if there is none."""
    try:
        seal = json.loads(read_kept(path / SEAL))
        if seal["recipe"] != recipe:
            return "it is of another version"
        if not is_private(path):
            return "other users can write to it"
        for name, digest in seal["files"].items():
            if _digest(path / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
