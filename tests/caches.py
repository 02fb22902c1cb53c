"""Cache folders of their own for tests that must not find what others left."""

from __future__ import annotations

from pathlib import Path

from mnemosyne.kernels.cpu.library import library_folder

KERNELS = library_folder()  # read now: tests set XDG_CACHE_HOME


def empty_cache(folder: Path) -> Path:
    """An empty cache folder but for compiled kernels, which depend on no test and take seconds."""
    (folder / "mnemosyne").mkdir(mode=0o700)
    (folder / "mnemosyne" / "kernels").symlink_to(KERNELS)
    return folder
