"""The import table holds; the package imports without its extras and without effects."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.import_table import find_breaches

ROOT = Path(__file__).resolve().parent.parent

IMPORT_QUIETLY = """
import logging, os, sys, threading, warnings
import torch

for name in (
    *("hydra", "omegaconf", "fastapi", "uvicorn", "triton", "matplotlib", "transformers"),
    *("zmq", "msgspec"),  # for several processes only
):
    sys.modules[name] = None  # importing it now raises ImportError

opened = []
def watch(event, args):
    if event == "open" and str(args[0]).startswith(sys.argv[1]):
        if not str(args[0]).endswith((".py", ".pyc")) and ".pyc." not in str(args[0]):
            opened.append(args[0])
sys.addaudithook(watch)

def state():
    return {
        "threads": threading.active_count(),
        "torch threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        "log handlers": list(logging.root.handlers) + list(logging.getLogger("mnemosyne").handlers),
        "log levels": (logging.root.level, logging.getLogger("mnemosyne").level),
        "warning filters": list(warnings.filters),
        "cuda": torch.cuda.is_initialized(),
    }

before = state()
import mnemosyne
for name in getattr(mnemosyne, "__all__", ()):
    getattr(mnemosyne, name)
changed = [key for key, value in state().items() if value != before[key]]
assert not changed, changed
assert not opened, opened
"""


def test_every_import_is_in_the_table() -> None:
    breaches = find_breaches(ROOT / "mnemosyne")

    assert not breaches, "\n".join(str(breach) for breach in breaches)


@pytest.mark.parametrize(
    ("path", "source", "target"),
    [
        ("schedule/plan.py", "import torch", "torch"),
        ("schedule/plan.py", "from mnemosyne.cache import pages", "mnemosyne.cache.pages"),
        ("runtime/step.py", "from mnemosyne.schedule.scheduler import X", "mnemosyne.schedule"),
        (
            "runtime/step.py",
            "def f():\n    import mnemosyne.model_zoo.llama",
            "mnemosyne.model_zoo",
        ),
        ("model_zoo/llama.py", "from mnemosyne import LLM", "mnemosyne"),
        ("cache/layout.py", "from . import pages", "mnemosyne.cache.pages"),
        ("attention/flex.py", "from ..serve.engine import Engine", "mnemosyne.serve"),
        ("attention/flex.py", "import importlib\nimportlib.import_module('kernels')", "kernels"),
        ("kernels/decode.py", "import mnemosyne.config", "mnemosyne.config"),
        ("serve/llm.py", "import typing\nif typing.TYPE_CHECKING:\n    import hydra", "hydra"),
        ("joining/rank.py", "from tools import plot_run", "tools"),
    ],
)
def test_a_planted_breach_is_found(path: str, source: str, target: str, tmp_path: Path) -> None:
    for name in ("__init__", "cache/pages", "schedule/scheduler", "serve/engine"):
        plant(tmp_path, f"{name}.py", "")
    plant(tmp_path, path, source)

    breaches = find_breaches(tmp_path)

    (breach,) = breaches
    assert breach.path == tmp_path / path
    assert breach.line == source.count("\n") + 1
    assert breach.target.startswith(target)
    assert path in str(breach)
    assert f"may import {', '.join((*breach.rule.rooms, *breach.rule.packages))}" in str(breach)


def test_rooms_behind_symlinks_are_read(tmp_path: Path) -> None:
    plant(tmp_path, "package/__init__.py", "")
    plant(tmp_path, "model_zoo/llama.py", "import mnemosyne.serve")
    (tmp_path / "package" / "model_zoo").symlink_to("../model_zoo")

    (breach,) = find_breaches(tmp_path / "package")

    assert breach.room == "model_zoo"


def test_the_package_imports_without_its_optional_dependencies_and_without_effects() -> None:
    command = [sys.executable, "-W", "error", "-c", IMPORT_QUIETLY, str(ROOT)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr


def plant(root: Path, path: str, source: str) -> None:
    """Write a source file, with the folders it needs."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)
