"""One command line for all ranks: started here or by torchrun, and only rank 0 is heard."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_module

import mnemosyne.parallel.launch
from mnemosyne import cli
from mnemosyne.cli import ranks
from mnemosyne.config import EngineConfig, MeshConfig
from mnemosyne.config_generate import GenerateConfig

Launched = list[tuple[list[str], int]]
Seen = list[GenerateConfig]

log = logging.getLogger("mnemosyne.tests")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Configs that ``generate`` was run with, in this process."""
    configs: Seen = []

    def run(config: GenerateConfig) -> int:
        sys.stdout.write("an answer\n")
        log.info("a remark")
        configs.append(config)
        return cli.OK

    stand_in(monkeypatch, run)
    monkeypatch.delenv("RANK", raising=False)
    return configs


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Commands that would have been started on several ranks, and their number."""
    commands: Launched = []

    def launch_local(command: list[str], world_size: int) -> int:
        commands.append((command, world_size))
        return 7

    monkeypatch.setattr(mnemosyne.parallel.launch, "launch_local", launch_local)
    return commands


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[[GenerateConfig], int]) -> None:
    command = cli.Command("stands in", GenerateConfig, run)
    monkeypatch.setitem(cli.COMMANDS, "generate", command)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "4")


def test_one_process_starts_no_ranks(seen: Seen, launched: Launched) -> None:
    status = cli.main(["generate", "model=x"])

    assert (status, len(seen), launched) == (cli.OK, 1, [])


@pytest.mark.parametrize(
    "words",
    [
        ["model=/some/path", "prompt=Hello, 'world' ${x} = \"y\"\\", "mesh.kvp=2"],
        ["model='C=1,(a) b'", "stop=[a,'b c']", "cache.max_tokens=1M", "mesh.kvp=2", "seed=null"],
        ["-", "model=x", "metrics.path=out ${seed}.jsonl", "mesh.kvp=2", "schedule=fixed"],
    ],
)
def test_ranks_are_started_with_words_that_say_the_same(
    words: list[str], seen: Seen, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = cli.main(["generate", "mesh.tp=2", *words])

    assert status == 7
    assert seen == []
    ((command, world_size),) = launched
    assert (command[:4], world_size) == ([sys.executable, "-m", "mnemosyne", "generate"], 4)

    as_rank(monkeypatch, 0)
    cli.main(command[3:])
    cli.main(["generate", "mesh.tp=2", *words])
    started, asked = seen
    assert started == asked


def test_each_run_of_a_sweep_starts_its_own_ranks(seen: Seen, launched: Launched) -> None:
    words = ["model=x", "prompt=a, b", "mesh.tp=1,2,4", "--multirun"]

    status = cli.main(["generate", *words])

    assert status == 7
    assert [config.mesh.tp for config in seen] == [1]
    assert [world_size for _, world_size in launched] == [2, 4]
    assert all("prompt=a, b" in command for command, _ in launched)
    assert not any("--multirun" in command for command, _ in launched)


def test_a_run_that_fails_in_another_process_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pids = itertools.count()
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(cli.os, "getpid", lambda: next(pids))
    stand_in(monkeypatch, lambda config: cli.FAILED)

    status = cli.main(["generate", "model=x"])

    assert status != cli.OK
    assert "mnemosyne generate ended with status 2" in capsys.readouterr().err


def test_the_slurm_launcher_has_what_its_plugin_asks_for() -> None:
    with initialize_config_module("mnemosyne.conf", version_base="1.3"):
        composed = compose(
            "generate", ["model=x", "hydra/launcher=slurm"], return_hydra_config=True
        )

    launcher = composed.hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node) == (1, 1)


def test_rank_0_prints_and_its_lines_say_so(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 0)

    status = cli.main(["generate", "model=x", "mesh.tp=4"])

    assert status == cli.OK
    printed = capsys.readouterr()
    assert printed.out == "an answer\n"
    assert printed.err == "INFO pp0/kvp0/tp0 mnemosyne.tests: a remark\n"


def test_other_ranks_follow_and_are_heard_only_when_something_goes_wrong(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 3)

    def follow(config: EngineConfig) -> int:
        sys.stdout.write("nobody hears\n")
        log.info("nor this")
        log.error("but this")
        return cli.OK

    monkeypatch.setattr(ranks, "follow", follow)

    status = cli.main(["generate", "model=x", "mesh.kvp=2", "mesh.tp=2"])

    assert (status, seen) == (cli.OK, [])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "ERROR pp0/kvp1/tp1 mnemosyne.tests: but this\n"


def test_an_error_of_another_rank_is_said_if_rank_0_has_none(
    seen: Seen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_rank(monkeypatch, 1)

    def follow(config: EngineConfig) -> int:
        raise ValueError("no GPU here")

    monkeypatch.setattr(ranks, "follow", follow)
    monkeypatch.setattr(ranks, "RANK_0_FIRST_S", 0.0)

    status = cli.main(["generate", "model=x", "mesh.tp=4"])

    assert status == cli.FAILED
    assert capsys.readouterr().err == "error: no GPU here\n"


@pytest.mark.parametrize(
    ("rank", "label"), [(0, "pp0/kvp0/tp0"), (1, "pp0/kvp0/tp1"), (23, "pp1/kvp2/tp3")]
)
def test_a_rank_is_called_by_its_place(rank: int, label: str) -> None:
    assert ranks.label_of(rank, MeshConfig(pp=2, kvp=3, tp=4)) == label
