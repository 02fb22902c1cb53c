"""The symlinked rooms and the configs work from a checkout, an editable install and a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from mnemosyne.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("mnemosyne", "kernels", "model_zoo", "conf", "pyproject.toml", "README.md", "LICENSE")

# Started with -I -S: the installed copy of the package, if any, must not answer instead.
USE_IT = """
import site, sys
from pathlib import Path

site.addsitedir(sys.argv[1])
sys.path += sys.argv[3:]
import mnemosyne.kernels, mnemosyne.model_zoo

assert Path(mnemosyne.__file__).is_relative_to(sys.argv[2]), mnemosyne.__file__
from hydra import compose, initialize_config_module
with initialize_config_module("mnemosyne.conf", version_base="1.3"):
    compose("generate", ["schedule=fixed"])
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, where a build may leave what it likes."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built by way of a source archive, as publishing does."""
    out = tmp_path_factory.mktemp("dist")
    build(checkout, "build_sdist", out)
    (archive,) = out.glob("*.tar.gz")
    shutil.unpack_archive(archive, out, filter="data")
    build(out / archive.name.removesuffix(".tar.gz"), "build_wheel", out)
    return next(out.glob("*.whl"))


def test_a_wheel_holds_every_module_and_config_as_a_real_file(wheel: Path) -> None:
    sources = [
        path.relative_to(ROOT).as_posix()
        for room in ("mnemosyne", "mnemosyne/kernels", "mnemosyne/model_zoo", "mnemosyne/conf")
        for pattern in ("**/*.py", "**/*.yaml", "*.json", "py.typed", "cpu/*.cpp", "cpu/*.h")
        for path in (ROOT / room).glob(pattern)
    ]

    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}

    assert "mnemosyne/conf/generate.yaml" in sources
    assert "mnemosyne/kernels/cpu/vector.h" in sources
    assert "mnemosyne/conf/attention_cuda.json" in sources
    assert {name: sizes.get(name) for name in sources} == {
        name: (ROOT / name).stat().st_size for name in sources
    }


def test_nothing_but_the_package_is_installed(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}

    assert {top for top in tops if not top.endswith(".dist-info")} == {"mnemosyne"}


def test_the_distribution_has_a_name_of_its_own_and_the_command_that_of_the_package(
    wheel: Path,
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {
            name.rpartition("/")[2]: name for name in archive.namelist() if "dist-info" in name
        }
        metadata = archive.read(files["METADATA"]).decode()
        scripts = archive.read(files["entry_points.txt"]).decode()

    assert metadata.splitlines()[1:3] == ["Name: mnemosyne-serving", f"Version: {VERSION}"]
    assert "mnemosyne = mnemosyne.__main__:main" in scripts


def test_a_wheel_works(wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(wheel, tmp_path, format="zip")

    use_from(tmp_path, found_in=tmp_path)


def test_a_checkout_works(checkout: Path) -> None:
    use_from(checkout, found_in=checkout)


def test_an_editable_install_works(checkout: Path, tmp_path: Path) -> None:
    build(checkout, "build_editable", tmp_path)
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path, format="zip")

    use_from(tmp_path, found_in=checkout)


def build(project: Path, hook: str, out: Path) -> None:
    """Call one PEP 517 hook of the builder: what pip does, without network and isolation."""
    call = f"from setuptools import build_meta; build_meta.{hook}({str(out)!r})"
    run([sys.executable, "-c", call], project)


def use_from(folder: Path, *, found_in: Path) -> None:
    """Import the rooms and find the configs with ``folder`` as the place of installed packages."""
    paths = [
        str(folder),
        str(found_in),
        sysconfig.get_path("platlib"),
        sysconfig.get_path("purelib"),
    ]
    run([sys.executable, "-I", "-S", "-c", USE_IT, *paths], folder)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
