"""Compile a C++ kernel for this processor when it is first asked for, and keep it on disk."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
_DIGEST_BYTES = hashlib.sha256().digest_size  # at the end of a library, of all that comes before


@cache
def load_library(name: str, compiler_flags: tuple[str, ...] = (), **constants: int) -> ctypes.CDLL:
    """The shared library of ``name.cpp``, compiled unless an earlier process did it.

    A file of an earlier process is loaded only if its bytes are those that were written, and if
    nobody but this user can have written them.

    Args:
        name: of the source in this folder.
        compiler_flags: those of its instruction set.
        constants: compile-time constants by macro name.

    Raises:
        RuntimeError: with what the compiler said, if it failed.
        OSError: if no folder for libraries can be written, or a library not be loaded.
    """
    compiler = find_compiler()
    assert compiler is not None
    shares_openmp = _share_openmp()
    library = build_library(
        compiler, name, compiler_flags, shares_openmp=shares_openmp, **constants
    )
    return ctypes.CDLL(str(library))


def build_library(
    compiler: str,
    name: str,
    compiler_flags: tuple[str, ...] = (),
    *,
    shares_openmp: bool = False,
    **constants: int,
) -> Path:
    """The file of a library, for the machine of a compiler (see ``load_library``).

    Args:
        compiler: of C++.
        name: as for ``load_library``, like the others.
        compiler_flags: those of its instruction set.
        shares_openmp: whether the process that loads it has OpenMP; else it is linked.
        constants: compile-time constants by macro name.
    """
    flags = ("-O3", *compiler_flags, "-std=c++17", "-fPIC", "-fopenmp", "-w")
    defines = [f"-D{key}={value}" for key, value in sorted(constants.items())]
    source = SOURCES / f"{name}.cpp"
    headers = sorted(SOURCES.glob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    recipe = (version.stdout, str(shares_openmp), *flags, *defines, *sorted(processor_flags()))
    digest = hashlib.sha256("\0".join(recipe).encode())
    for path in (source, *headers):
        digest.update(path.read_bytes())
    target = library_folder() / f"{name}-{digest.hexdigest()[:20]}.so"
    damage = _damage(target)
    if damage is not None:
        if target.exists():
            log.warning("%s is compiled again: %s", target, damage)
        else:
            log.info("compiling %s for this processor, once", target.stem)
        _compile([compiler, *flags, *defines], source, target, shares_openmp)
    return target


def _damage(library: Path) -> str | None:
    """Why a library must not be loaded, None if it may."""
    try:
        if not _is_private(library):
            return "other users can write to it"
        content = library.read_bytes()
    except OSError as error:
        return str(error)
    digest = hashlib.sha256(content[:-_DIGEST_BYTES]).digest()
    return None if content[-_DIGEST_BYTES:] == digest else "it is not as it was written"


def _compile(command: list[str], source: Path, target: Path, shares_openmp: bool) -> None:
    """Into a file of its own first: several processes may do the same at once."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        obj, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        link = [command[0], "-shared", str(obj), "-o", str(library)]
        if not shares_openmp:
            link.append("-lgomp")
        for step in ([*command, "-c", str(source), "-o", str(obj)], link):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(step)} failed:\n{done.stderr}")
        with library.open("r+b") as file:
            # Nothing reads what follows the sections of a library.
            digest = hashlib.file_digest(file, "sha256").digest()
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        library.chmod(0o700)
        os.replace(library, target)


@cache
def _share_openmp() -> bool:
    """Let libraries find the OpenMP that torch has loaded: two pools of threads would compete."""
    maps = Path("/proc/self/maps").read_text()
    found = re.search(r"(/\S*/lib(?:gomp|iomp5)\S*)", maps)
    if found is None:
        return False
    ctypes.CDLL(found[1], mode=ctypes.RTLD_GLOBAL)
    return True


@cache
def processor_flags() -> frozenset[str]:
    """Instructions of this processor, as Linux names them."""
    return flags_of(Path("/proc/cpuinfo").read_text())


def flags_of(info: str) -> frozenset[str]:
    """The abilities of a processor, as the text of ``/proc/cpuinfo`` lists them."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)  # of x86, of ARM
    return frozenset(found[1].split()) if found else frozenset()


@cache
def find_compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    return shutil.which("g++") or shutil.which("c++")


def library_folder() -> Path:
    """Where libraries are kept: nobody else can write there."""
    root = _cache_root()
    folder = root / "mnemosyne" / "kernels" if root is not None else None
    return _usable(folder)


def _cache_root() -> Path | None:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return None


@cache
def _usable(folder: Path | None) -> Path:
    """The folder, made for this user alone, or a temporary one until this process ends."""
    try:
        if folder is not None:
            for each in (folder.parent, folder):
                each.mkdir(mode=0o700, parents=True, exist_ok=True)
                if each.stat().st_uid == os.geteuid():
                    each.chmod(0o700)
            if all(map(_is_private, (folder.parent, folder))) and os.access(folder, os.W_OK):
                return folder
    except OSError:
        pass
    log.warning(
        "kernels are compiled at each start: %s is no folder of this user that can be written; "
        "set XDG_CACHE_HOME to one",
        folder,
    )
    return _temporary()


@cache
def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="mnemosyne-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _is_private(path: Path) -> bool:
    """Return whether a file or folder is this user's or root's, and no one else can write to it."""
    status = path.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022
