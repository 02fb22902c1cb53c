"""The machine as this process may use it: cores, processor, memory, and a folder to keep files."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

PROC = Path("/proc")
_SHARED = stat.S_IWGRP | stat.S_IWOTH


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_name(proc: Path = PROC) -> str:
    """The processor's model, as its maker calls it."""
    return _cpuinfo("model name", proc) or platform.processor() or platform.machine()


def instructions(proc: Path = PROC) -> tuple[str, ...]:
    """Instruction sets and features of the processor, sorted; machines of one name may differ."""
    return tuple(sorted((_cpuinfo("flags", proc) or _cpuinfo("Features", proc)).split()))


def cache_folder(name: str = "") -> Path:
    """A folder for files that this program can make again, which nobody else can write to.

    It lies in ``$XDG_CACHE_HOME/mnemosyne``, by default ``~/.cache/mnemosyne``. Where that cannot
    be written or belongs to somebody else, a temporary folder takes its place until this process
    ends, and a warning says so once.

    Args:
        name: of a folder in it, which is made if need be; unset: the folder of all.
    """
    folder = _usable(_cache_root()) / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def is_private(path: Path) -> bool:
    """Return whether a file or folder is this user's or root's, and no one else can write to it."""
    status = path.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & _SHARED


def _cache_root() -> Path | None:
    """The folder for this user's caches; None for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():  # others are to be ignored, says the XDG specification
        return given / "mnemosyne"
    try:
        return Path.home() / ".cache" / "mnemosyne"
    except RuntimeError:
        return None


@cache
def _usable(root: Path | None) -> Path:
    """The folder, ready to use, or a temporary one in its place."""
    reason = _why_not(root)
    if reason is None:
        assert root is not None
        return root
    log.warning(
        "no files are kept for the next start: %s; set XDG_CACHE_HOME to a folder of yours", reason
    )
    return _temporary()


def _why_not(root: Path | None) -> str | None:
    """Why nothing can be kept in a folder, None if it is ready."""
    if root is None:
        return "this user has no home folder"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.stat().st_uid == os.geteuid():
            root.chmod(0o700)
    except OSError as error:
        return f"{root} cannot be made ({error.strerror})"
    if not is_private(root):
        return f"{root} can be written by other users"
    return None if os.access(root, os.W_OK | os.X_OK) else f"{root} cannot be written"


@cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="mnemosyne-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _cpuinfo(name: str, proc: Path) -> str:
    try:
        text = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^{name}\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
