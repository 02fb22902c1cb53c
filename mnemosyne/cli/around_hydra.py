"""Surroundings of a run of Hydra: the words it reads, the folder it writes to, its errors."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

NO_PLUGIN = "Unknown plugin class : "  # Hydra's words for a launcher that is not installed


@contextmanager
def errors_of_hydra() -> Iterator[None]:
    """Make one ValueError of what Hydra refuses, which it would print over several lines.

    Raises:
        ValueError: with its first line.
    """
    name = "HYDRA_FULL_ERROR"  # the only way to have it raise
    usual = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{str(error).strip().partition(chr(10))[0]}; see --help") from error
    except RuntimeError as error:
        if not str(error).startswith(NO_PLUGIN):
            raise
        raise ValueError(
            f"hydra/launcher must be installed, got no class {str(error)[len(NO_PLUGIN) :]}; "
            "pip install hydra-submitit-launcher"
        ) from error
    finally:
        del os.environ[name]
        if usual is not None:
            os.environ[name] = usual


@contextmanager
def sweep_folder(flags: Sequence[str]) -> Iterator[list[str]]:
    """The folder for the records of a sweep, as an override; the caller's folder stays clean.

    A single run has none: a rank that is killed could not take it away.
    """
    if not {"--multirun", "-m"} & set(flags):
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="mnemosyne-") as folder:
        yield [f"hydra.sweep.dir={folder}"]


@contextmanager
def process_arguments(*arguments: str) -> Iterator[None]:
    """Replace the words of the shell: Hydra reads nothing else."""
    said, sys.argv = sys.argv, list(arguments)
    try:
        yield
    finally:
        sys.argv = said
