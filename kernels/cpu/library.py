"""Compile a C++ kernel for this processor when it is first asked for, and keep it on disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
TILES = ("amx_tile", "amx_bf16")
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # of Linux on x86_64
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-w")
SOURCES = Path(__file__).parent


@cache
def what_is_missing() -> str | None:
    """Why the kernels cannot run here, None if they can; the first time on a machine tries it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they run on Linux x86_64, this is {platform.system()} {platform.machine()}"
    lacking = [flag for flag in NEEDED if flag not in _processor()]
    if lacking:
        return f"this processor lacks {', '.join(lacking)}"
    if _compiler() is None:
        return "there is no C++ compiler; install g++"
    try:
        load_library("linear")
    except RuntimeError as error:  # a compiler older than the processor, most likely
        return f"{_compiler()} cannot build them, see below; install g++ 11 or newer\n{error}"
    except OSError as error:
        return f"a library cannot be kept in {_folder()} ({error}); make it writable"
    return None


@cache
def what_is_missing_for_tiles() -> str | None:
    """Why kernels with AMX cannot run here, None if they can; asks the system to let them."""
    missing = what_is_missing()
    if missing is not None:
        return missing
    lacking = [flag for flag in TILES if flag not in _processor()]
    if lacking:
        return f"this processor lacks {', '.join(lacking)}"
    if not _allow_tiles():
        return "the system does not let this process use AMX; it takes Linux 5.16 or newer"
    return None


def _allow_tiles() -> bool:
    """Ask for the registers of AMX, for all threads of this process."""
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0


@cache
def load_library(name: str, **constants: int) -> ctypes.CDLL:
    """The shared library of ``name.cpp``, compiled unless an earlier process did it.

    Args:
        name: of the source in this folder.
        constants: compile-time constants by macro name.

    Raises:
        RuntimeError: with what the compiler said, if it failed.
        OSError: if the folder of libraries cannot be written, or a library not be loaded.
    """
    compiler = _compiler()
    assert compiler is not None
    defines = [f"-D{key}={value}" for key, value in sorted(constants.items())]
    source = SOURCES / f"{name}.cpp"
    headers = sorted(SOURCES.glob("*.h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    recipe = (version.stdout, *FLAGS, *defines, *sorted(_processor()))
    digest = hashlib.sha256("\0".join(recipe).encode())
    for path in (source, *headers):
        digest.update(path.read_bytes())
    target = _folder() / f"{name}-{digest.hexdigest()[:20]}.so"
    _share_openmp()
    if not target.exists():
        _compile([compiler, *FLAGS, *defines], source, target)
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
def _processor() -> frozenset[str]:
    info = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^flags\s*:(.*)$", info, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


@cache
def _compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "mnemosyne" / "kernels"
