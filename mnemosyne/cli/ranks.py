"""A command on the ranks of a mesh: started here unless torchrun did, silent on all but rank 0."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from mnemosyne.cli.arguments import LITERAL_KEY
from mnemosyne.config import EngineConfig, MeshConfig
from mnemosyne.config_serve import ServeConfig
from mnemosyne.parallel.start import started_rank
from mnemosyne.process import INTERRUPTED, TERMINATED, Terminated, sigterm_ignored

RANK_0_FIRST_S = 1.0  # an error that all ranks meet is said by rank 0, which ends the others


def run_on_ranks(
    run: Callable[[Any], int], config: EngineConfig, command: Callable[[], Sequence[str]]
) -> int:
    """Run a command on the ranks that it belongs to.

    Args:
        run: the command; rank 0, or the only process, runs it.
        config: its config.
        command: gives program and arguments that do in a new process what this one is asked to.

    Returns:
        The exit status.
    """
    if "RANK" in os.environ:
        return run_as_rank(int(os.environ["RANK"]), run, config)
    if config.mesh.world_size == 1:
        return run(config)
    # Imported lazily: it comes with torch.
    from mnemosyne.parallel.launch import launch_local

    return launch_local(command(), config.mesh.world_size)


def run_as_rank(rank: int, run: Callable[[Any], int], config: EngineConfig) -> int:
    """Run a command on rank 0, follow it on the others, which print nothing but errors."""
    with started_rank(rank) as termination:
        if rank > 0:
            return _run_follower(rank, config)
        with labelled(rank, config.mesh, logging.INFO):
            try:
                status = run(config)
            except Terminated:
                return TERMINATED
        return TERMINATED if termination.came and status == INTERRUPTED else status


def _run_follower(rank: int, config: EngineConfig) -> int:
    with (
        labelled(rank, config.mesh, logging.ERROR),
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
    ):
        try:
            return follow(config)
        except (ValueError, OSError):
            time.sleep(RANK_0_FIRST_S)
            raise


def follow(config: EngineConfig) -> int:
    """Take part in whatever rank 0 does with its engine.

    Under a server SIGTERM, which torchrun sends to all, is rank 0's to hear: running requests
    finish first.
    """
    from mnemosyne.llm import LLM

    with (
        LLM.from_config(config) as llm,
        sigterm_ignored() if isinstance(config, ServeConfig) else nullcontext(),
    ):
        llm.follow()
    return 0


def command_of_run(name: str, flags: Sequence[str]) -> list[str]:
    """This run, one of many in a sweep perhaps, as program and arguments.

    Args:
        name: of the command.
        flags: of Hydra; the one that asks for a sweep is left out.
    """
    parser = OverridesParser.create()
    words = []
    for override in parser.parse_overrides(list(HydraConfig.get().overrides.task)):
        is_literal = override.key_or_group == LITERAL_KEY
        # A literal is quoted once more where it arrives.
        word = f"{LITERAL_KEY}={override.value()}" if is_literal else override.input_line
        words.append(str(word))
    kept = [flag for flag in flags if flag not in ("--multirun", "-m")]
    return [sys.executable, "-m", "mnemosyne", name, *kept, *words]


def label_of(rank: int, mesh: MeshConfig) -> str:
    """The label of a rank before it has joined the mesh; tp is the innermost axis."""
    outer, tp = divmod(rank, mesh.tp)
    pp, kvp = divmod(outer, mesh.kvp)
    return f"pp{pp}/kvp{kvp}/tp{tp}"


@contextmanager
def labelled(rank: int, mesh: MeshConfig, level: int) -> Iterator[None]:
    """Begin every line that the package logs with the rank it comes from."""
    package = logging.getLogger("mnemosyne")
    formatters = [handler.formatter for handler in package.handlers]
    formatter = logging.Formatter(f"%(levelname)s {label_of(rank, mesh)} %(name)s: %(message)s")
    old_level = package.level
    package.setLevel(level)
    for handler in package.handlers:
        handler.setFormatter(formatter)
    try:
        yield
    finally:
        package.setLevel(old_level)
        for handler, old in zip(package.handlers, formatters, strict=True):
            handler.setFormatter(old)
