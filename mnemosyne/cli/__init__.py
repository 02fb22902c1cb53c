"""``mnemosyne COMMAND key=value ...``: the only room that knows Hydra, and that prints."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from mnemosyne.cli.arguments import describe_type, key_types, nearest, prepare
from mnemosyne.cli.around_hydra import errors_of_hydra, process_arguments, sweep_folder
from mnemosyne.cli.ranks import command_of_run, run_on_ranks
from mnemosyne.config_bench import BenchConfig
from mnemosyne.config_client import BenchServeConfig, ChatConfig
from mnemosyne.config_generate import DemoConfig, GenerateConfig
from mnemosyne.config_serve import DrainConfig, ServeConfig
from mnemosyne.config_simulate import PlanConfig, SimulateConfig
from mnemosyne.process import (
    INTERRUPTED,
    TERMINATED,
    UNREAD,
    KeptBack,
    drop_output,
    ended_at_once,
    flush_output,
    open_streams,
    say,
    terminable,
)

OK, FAILED = 0, 2  # exit statuses


@dataclass(frozen=True, slots=True)
class Command:
    """One word after ``mnemosyne``; its primary config has the same name."""

    summary: str
    config: type
    run: Callable[[Any], int]  # takes the config, returns the exit status
    has_ranks: bool = True  # whether it needs the ranks of its mesh
    positional: str | None = None  # the key that its first word is, where that word names none
    # the part outside the ranks, if there is one: takes the config, and a maker of the command
    front: Callable[[Any, Callable[[], Sequence[str]]], int] | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after ``mnemosyne``; unset: those of this process.

    Returns:
        The exit status: 0 if all went well, 2 after an error (one line on standard error), 130
        after Ctrl-C, 143 after SIGTERM, 141 if what reads standard output has gone.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    with terminable() as termination:
        status = _run(words)
    return TERMINATED if termination.came and status == INTERRUPTED else status


def _run(words: Sequence[str]) -> int:
    """Run the words of a command line; see ``main``."""
    try:
        if not words or words[0] in ("-h", "--help"):
            print(usage())
            status = OK if words else FAILED
        else:
            with logging_to_stderr():
                status = run_command(*two_words(words))
        flush_output()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        drop_output()
        return UNREAD
    except (ValueError, OSError) as error:
        return complain(error)
    return status


def usage() -> str:
    """The text of ``mnemosyne --help``."""
    lines = [f"  {name:<13}{command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        (
            "Usage: mnemosyne COMMAND [key=value ...]",
            "",
            "Exact long-context serving of language models.",
            "",
            "Commands:",
            *lines,
            "",
            "mnemosyne COMMAND --help lists the keys of a command, with examples.",
        )
    )


def run_command(name: str, arguments: Sequence[str]) -> int:
    """Let Hydra compose the config of a command, once or for each run of a sweep, and run it.

    Raises:
        ValueError: for an unknown command, key or option, naming the nearest one.
    """
    if name not in COMMANDS:
        raise ValueError(
            f"command must be one of {', '.join(COMMANDS)}, got {name!r}; "
            f"did you mean {nearest(name, COMMANDS)}?"
        )
    command = COMMANDS[name]
    if command.positional and arguments and not re.match(r"-|[\w.]+=", arguments[0]):
        arguments = [f"{command.positional}={arguments[0]}", *arguments[1:]]
    flags, words = prepare(arguments, command.config)
    statuses = []
    process = os.getpid()
    # Hydra and OmegaConf make errors of their own of an exception that comes in their midst.
    signals = KeptBack()

    def job(composed: DictConfig) -> None:
        # One run of a sweep may be refused; the others are not affected.
        try:
            again = partial(command_of_run, name, flags)
            config = to_config(composed, command.config)
            with signals.released():
                status = _run_composed(command, config, again)
        except BrokenPipeError:
            drop_output()
            status = UNREAD
        except (ValueError, OSError) as error:
            status = complain(error)
        statuses.append(status)
        if status != OK and os.getpid() != process:
            # A launcher of Hydra runs this elsewhere; an error is all that comes back from there.
            raise EndedElsewhereError(f"mnemosyne {name} ended with status {status}")
        if status == INTERRUPTED:
            raise KeyboardInterrupt  # no further run of a sweep begins

    run = hydra.main(
        config_path="pkg://mnemosyne.conf", config_name=file_of(name), version_base="1.3"
    )(job)
    with (
        signals.holding(),
        sweep_folder(flags) as folder,
        process_arguments(f"mnemosyne {name}", *flags, *folder, *words),
    ):
        try:
            with errors_of_hydra():
                run()
        except SystemExit as stop:  # after --help, or what Hydra itself refuses
            return int(stop.code or OK)
        except EndedElsewhereError as error:
            return complain(error)
    return max(statuses, default=OK)


def _run_composed(command: Command, config: Any, again: Callable[[], Sequence[str]]) -> int:
    """Run a command here, on ranks or behind a front; ``again`` gives the words of this run."""
    if command.front is not None and "RANK" not in os.environ:
        return command.front(config, again)
    if command.has_ranks:
        return run_on_ranks(command.run, config, again)
    return command.run(config)


class EndedElsewhereError(RuntimeError):
    """A run of a sweep failed in another process, where the reason was said."""


def config_of(name: str, *words: str) -> Any:
    """The config that ``mnemosyne NAME WORDS`` runs with, for programs that run it themselves.

    Raises:
        ValueError: as ``to_config`` does.
    """
    with hydra.initialize_config_module("mnemosyne.conf", version_base="1.3"):
        return to_config(hydra.compose(file_of(name), list(words)), COMMANDS[name].config)


def to_config(composed: DictConfig, kind: type) -> Any:
    """The typed and checked config that the rest of the package sees.

    Raises:
        ValueError: if a value is missing, of the wrong type, or out of its range.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), composed))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} must be set; add {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        key, types = error.full_key, key_types(kind)
        if not isinstance(error, ValidationError) or key not in types:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{key or 'config'}: {reason}; see --help") from error
        value = OmegaConf.select(composed, key)
        raise ValueError(
            f"{key} must be {describe_type(types[key])}, got {value!r}; see --help"
        ) from error


def complain(error: Exception) -> int:
    """Print an error that a user can act on; return the exit status that goes with it."""
    say(f"error: {error}")
    return FAILED


class StderrHandler(logging.Handler):
    """Writes to the standard error of the moment: a live display may stand in for it."""

    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


@contextmanager
def logging_to_stderr() -> Iterator[None]:
    """Show what the package logs while a command runs."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    package = logging.getLogger("mnemosyne")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _late(name: str) -> Callable[..., int]:
    """A function of the module of its name, imported when it runs: help needs no torch."""

    def run(*arguments: Any) -> int:
        with ended_at_once():
            module = import_module(f"mnemosyne.cli.{name}")
        status: int = getattr(module, name)(*arguments)
        return status

    return run


def file_of(name: str) -> str:
    """Name of the primary config of a command."""
    return name.replace(" ", "_")


def two_words(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command and what follows; some commands are two words."""
    joined = " ".join(words[:2])
    return (joined, words[2:]) if joined in COMMANDS else (words[0], words[1:])


COMMANDS = {
    "generate": Command("prompts in, tokens out", GenerateConfig, _late("generate")),
    "serve": Command("OpenAI's API over HTTP", ServeConfig, _late("serve"), front=_late("front")),
    "chat": Command("a conversation in the terminal", ChatConfig, _late("chat")),
    "drain": Command(
        "a server finishes what runs",
        DrainConfig,
        _late("drain"),
        has_ranks=False,
        positional="url",
    ),
    "demo": Command(
        "a passkey in a long text, short requests beside it", DemoConfig, _late("demo")
    ),
    "simulate": Command(
        "a workload on hardware that is not there",
        SimulateConfig,
        _late("simulate"),
        has_ranks=False,
    ),
    "plan": Command(
        "which layout of a model fits some GPUs", PlanConfig, _late("plan"), has_ranks=False
    ),
    "bench": Command(
        "this engine and others side by side", BenchConfig, _late("bench"), has_ranks=False
    ),
    "bench serve": Command(
        "load for a server", BenchServeConfig, _late("bench_serve"), has_ranks=False
    ),
}
