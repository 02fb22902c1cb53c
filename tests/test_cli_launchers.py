"""Sweeps by a launcher that is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from mnemosyne import cli
from mnemosyne.cli.around_hydra import errors_of_hydra


@pytest.mark.skipif(find_spec("submitit") is not None, reason="it is installed")
def test_a_launcher_that_is_missing_is_one_line_that_says_what_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["generate", "--multirun", "hydra/launcher=slurm", "model=x", "prompt=y"]

    status = cli.main(words)

    (line,) = capsys.readouterr().err.splitlines()
    assert status == cli.FAILED
    assert line.startswith("error: hydra/launcher must be installed, got no class ")
    assert line.endswith("; pip install hydra-submitit-launcher")


def test_other_errors_in_a_run_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="of an engine"), errors_of_hydra():
        raise RuntimeError("of an engine")
