"""Compile a C++ kernel for this processor when it is first asked for, and keep it on disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent


@cache
def load_library(name: str, compiler_flags: tuple[str, ...] = (), **constants: int) -> ctypes.CDLL:
    """The shared library of ``name.cpp``, compiled unless an earlier process did it.

    Args:
        name: of the source in this folder.
        compiler_flags: those of its instruction set.
        constants: compile-time constants by macro name.

    Raises:
        RuntimeError: with what the compiler said, if it failed.
        OSError: if the folder of libraries cannot be written, or a library not be loaded.
    """
    compiler = find_compiler()
    assert compiler is not None
    flags = ("-O3", *compiler_flags, "-std=c++17", "-fPIC", "-fopenmp", "-w")
    defines = [f"-D{key}={value}" for key, value in sorted(constants.items())]
    source = SOURCES / f"{name}.cpp"
    headers = sorted(SOURCES.glob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    recipe = (version.stdout, *flags, *defines, *sorted(processor_flags()))
    digest = hashlib.sha256("\0".join(recipe).encode())
    for path in (source, *headers):
        digest.update(path.read_bytes())
    target = library_folder() / f"{name}-{digest.hexdigest()[:20]}.so"
    _share_openmp()
    if not target.exists():
        _compile([compiler, *flags, *defines], source, target)
    return ctypes.CDLL(str(target))


def _compile(command: list[str], source: Path, target: Path) -> None:
    """Into a file of its own first: several processes may do the same at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        obj, library = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
        link = [command[0], "-shared", str(obj), "-o", str(library)]
        if not _share_openmp():
            link.append("-lgomp")
        for step in ([*command, "-c", str(source), "-o", str(obj)], link):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{' '.join(step)} failed:\n{done.stderr}")
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
    """What this processor can do, as Linux on x86 calls it."""
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^flags\s*:(.*)$", info, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


@cache
def find_compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    return shutil.which("g++") or shutil.which("c++")


def library_folder() -> Path:
    """Where libraries are kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mnemosyne" / "kernels"
