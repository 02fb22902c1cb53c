"""Words on the command line become a typed config; what is wrong is said in one line."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mnemosyne import cli
from mnemosyne.cli.arguments import key_types, quote
from mnemosyne.config import EngineConfig
from mnemosyne.config_generate import GenerateConfig
from mnemosyne.config_simulate import PlanConfig, SimulateConfig
from mnemosyne.process import INTERRUPTED
from mnemosyne.request import SamplingParams

Seen = list[GenerateConfig]

TRICKY = (
    "\\",
    "'",
    '"',
    "${",
    "$",
    "{",
    "}",
    "[",
    "(",
    ",",
    "=",
    ":",
    "~",
    "#",
    "\n",
    " ",
    "x",
    "é",
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Seen:
    """Configs that ``generate`` was run with; nothing is generated, in an empty folder."""
    configs: Seen = []
    stand_in(monkeypatch, lambda config: configs.append(config) or cli.OK)
    monkeypatch.chdir(tmp_path)
    return configs


def leaves(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all values in nested dictionaries."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Callable[[GenerateConfig], int]) -> None:
    command = cli.Command("stands in", GenerateConfig, run)
    monkeypatch.setitem(cli.COMMANDS, "generate", command)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_yaml_and_dataclass_have_the_same_keys_and_defaults(name: str) -> None:
    kind = cli.COMMANDS[name].config
    values = {"model": "x", "url": "http://x"}
    named = {f.name for f in fields(kind)} & values.keys()
    with initialize_config_module("mnemosyne.conf", version_base="1.3"):
        composed = compose(cli.file_of(name), [f"{key}={values[key]}" for key in sorted(named)])

    types = key_types(kind)
    assert set(leaves(OmegaConf.to_container(composed))) == {
        key for key in types if not any(other.startswith(f"{key}.") for other in types)
    }
    made = cli.to_config(composed, kind)
    required = {f.name for f in fields(kind) if f.default is f.default_factory is MISSING}
    assert made == kind(**{name: getattr(made, name) for name in required | named})


def test_every_sampling_parameter_is_a_key_of_generate() -> None:
    keys = {field.name for field in fields(GenerateConfig)}

    assert {field.name for field in fields(SamplingParams)} <= keys


def test_words_reach_the_command_typed_and_checked(seen: Seen) -> None:
    words = [
        "schedule=fixed",
        "schedule.chunk=1K",
        "cache.max_tokens=1M",
        "seed=7",
        "stop=[a,'b c']",
        "logit_bias={3:-1.5,4:2}",
        "prompt_logprobs=1",
    ]

    status = cli.main(["generate", "model=needle", "token_ids=[[1,2],[3]]", *words])

    assert status == cli.OK
    (config,) = seen
    assert type(config) is GenerateConfig
    assert (config.model, config.seed, config.stop) == ("needle", 7, ["a", "b c"])
    assert (config.logit_bias, config.prompt_logprobs) == ({3: -1.5, 4: 2.0}, 1)
    assert (config.schedule.chunk, config.cache.max_tokens) == (1024, 2**20)
    assert config.token_ids == [[1, 2], [3]]


@pytest.mark.parametrize(
    "text",
    [
        'Hello, world = "x" (really)',
        "null",
        "a \\\\${model} 'b\\",
        "tab\there\r\nthen $HOME, 100%, [x](y), {z}: ~/~",
    ],
)
def test_a_prompt_is_taken_as_it_stands(text: str, seen: Seen) -> None:
    status = cli.main(["generate", "model=x", f"prompt={text}"])

    assert status == cli.OK
    assert seen[0].prompt == text


@settings(max_examples=200)
@given(st.lists(st.sampled_from(TRICKY), max_size=8).map("".join))
def test_any_text_survives_the_grammars_of_hydra_and_omegaconf(text: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"p={quote(text, is_literal=True)}"])

    assert OmegaConf.create({"p": str(override.value())}).p == text


@pytest.mark.parametrize(
    "path", ["/some/path", "C=1,(a) b", "needle", "1e3", "~/models/llama-3.1", "a'b", "007", "on"]
)
def test_model_takes_any_path(path: str, seen: Seen) -> None:
    cli.main(["generate", f"model={path}"])

    assert seen[0].model == path


def test_paths_may_refer_to_other_keys(seen: Seen) -> None:
    words = ["model=x", "seed=3", "output=out ${seed}.jsonl", "metrics.path=null"]

    cli.main(["generate", *words])

    assert (seen[0].output, seen[0].metrics.path) == ("out 3.jsonl", None)


def test_a_dash_reads_standard_input(seen: Seen) -> None:
    cli.main(["generate", "model=x", "-"])

    assert seen[0].prompt_file == "-"


def test_a_single_run_makes_no_folder_that_a_kill_would_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made: list[list[Path]] = []
    stand_in(monkeypatch, lambda config: made.append(list(tmp_path.iterdir())) or cli.OK)

    cli.main(["generate", "model=x", "prompt=one"])
    cli.main(["generate", "model=x", "prompt=one", "--multirun"])

    single, sweep = made
    assert single == []
    assert len(sweep) == 1, "a sweep has one, which goes with it"
    assert list(tmp_path.iterdir()) == []


def test_multirun_runs_every_combination_and_leaves_no_files(seen: Seen, tmp_path: Path) -> None:
    words = ["model=a,b", "schedule.chunk=256,adaptive", "prompt=one, two", "--multirun"]

    status = cli.main(["generate", *words])

    assert status == cli.OK
    assert [(config.model, config.schedule.chunk) for config in seen] == [
        ("a", 256),
        ("a", "adaptive"),
        ("b", 256),
        ("b", "adaptive"),
    ]
    assert {config.prompt for config in seen} == {"one, two"}
    assert list(tmp_path.iterdir()) == []


def test_cfg_prints_the_config_and_runs_nothing(
    seen: Seen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["generate", "model=/some/path", "--cfg", "job", "cache.page_size=64"])

    assert status == cli.OK
    printed: Any = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert (printed["model"], printed["cache"]["page_size"]) == ("/some/path", 64)
    assert seen == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["genrate"],
            "got 'genrate'; did you mean generate?",
        ),
        (["generate", "max_token=3"], "got 'max_token'; did you mean max_tokens?"),
        (["generate", "chunk=512"], "got 'chunk'; did you mean schedule.chunk?"),
        (["generate", "cash.max_tokens=1M"], "did you mean cache.max_tokens?"),
        (["generate", "schedule=fixd"], "got 'fixd'; did you mean fixed"),
        (["generate", "schedule=fixed,adaptiv", "-m"], "got 'adaptiv'; did you mean adaptive"),
        (["generate", "--max-tokens", "3"], "the key max_tokens=...?"),
        (["generate", "--cgf", "job"], "got '--cgf'; did you mean --cfg"),
        (["generate", "Hello"], "argument must be key=value, got 'Hello'"),
        (["generate", "+model=x"], "argument must be key=value, got '+model=x'"),
        (["generate", "~prompt"], "argument must be key=value, got '~prompt'"),
        (["generate", "stop=a,b"], "stop must be one value, got 'a,b'; write [...] for a list"),
        (["generate", "stop=['a,b]"], "put texts in quotes, and the whole in others: \"stop=['"),
        (["generate", "prompt=x"], "model must be set; add model=..."),
        (
            ["generate", "model=x", "temperature=hot"],
            "temperature must be float or null, got 'hot'",
        ),
        (["generate", "model=x", "prompts=a"], "prompts must be list, got 'a'"),
        (["generate", "model=x", "cache={pages:3}"], "cache must be one of shared"),
        (
            ["generate", "model=x", "metrics={pth:y}"],
            "metrics must be set key by key, got '{pth:y}'",
        ),
        (["generate", "model=${nowhere}"], "model: Interpolation key 'nowhere' not found"),
        (["generate", "model=x", "cache.max_tokens=1X"], "cache.max_tokens must be a whole number"),
        (["generate", "model=x", "mesh.tp=0"], "mesh.tp must be >= 1, got 0"),
        (["generate", "model=x", "prompt=???"], "prompt must be a text other than '???'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    words: list[str], said: str, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(words)

    printed = capsys.readouterr()
    assert status == cli.FAILED
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert seen == []


@pytest.mark.parametrize("error", [ValueError("no such checkpoint"), OSError(2, "gone", "model")])
def test_an_error_from_below_is_one_line_and_does_not_end_a_sweep(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []

    def run(config: GenerateConfig) -> int:
        ran.append(config.model)
        if config.model == "bad":
            raise error
        return cli.OK

    stand_in(monkeypatch, run)

    status = cli.main(["generate", "--multirun", "model=bad,good"])

    assert status == cli.FAILED
    assert ran == ["bad", "good"]
    assert capsys.readouterr().err == f"error: {error}\n"


def test_ctrl_c_ends_a_sweep_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(config: GenerateConfig) -> int:
        ran.append(config.model)
        raise KeyboardInterrupt

    stand_in(monkeypatch, run)

    status = cli.main(["generate", "--multirun", "model=a,b"])

    assert status == INTERRUPTED
    assert ran == ["a"]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    statuses = cli.main(["--help"]), cli.main([])

    assert statuses == (cli.OK, cli.FAILED)
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in cli.COMMANDS)


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_help_of_a_command_lists_groups_and_keys(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = cli.main([*name.split(), "--help"])

    assert status == cli.OK
    printed = capsys.readouterr().out
    assert f"Usage: mnemosyne {name} " in printed
    has_engine = issubclass(cli.COMMANDS[name].config, EngineConfig | SimulateConfig | PlanConfig)
    assert ("schedule: adaptive, fixed" in printed) == has_engine
    assert "\nmodel: " in printed or name == "drain"
    assert "_quiet" not in printed


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mnemosyne", "generate", "promt=x"]
    root = Path(__file__).resolve().parent.parent
    environment = {"PYTHONPATH": str(root), "PATH": ""}

    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == cli.FAILED
    assert done.stderr.endswith("got 'promt'; did you mean prompt?\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "stop"),
    [
        (r'stop=["\n"]', ["\n"]),
        (r"stop=['\n\n','User:']", ["\n\n", "User:"]),
        (r"stop=[\n]", ["\n"]),  # the shell took the quotes
        (r"stop=\n", ["\n"]),
        ("stop=['\n']", ["\n"]),
        (r"stop=['a\tb','\r']", ["a\tb", "\r"]),
        (r"stop=['\\n']", [r"\n"]),
        (r"stop=['\d+']", [r"\d+"]),
        ("stop=[</s>,###, <|im_end|>]", ["</s>", "###", "<|im_end|>"]),
        ("stop=['it\\'s ${x}']", ["it's ${x}"]),
        ("stop=[a(,b]", ["a(", "b"]),
        ("stop=[]", []),
        ("stop=END", ["END"]),
    ],
)
def test_stop_strings_are_what_they_look_like(word: str, stop: list[str], seen: Seen) -> None:
    status = cli.main(["generate", "model=x", "prompt=y", word])

    assert status == cli.OK
    assert seen[0].stop == stop


def test_a_prompt_of_a_list_keeps_its_backslashes(seen: Seen) -> None:
    cli.main(["generate", "model=x", r"prompts=['\\alpha \n','b']"])

    assert seen[0].prompts == [r"\\alpha \n", "b"]


@pytest.mark.parametrize("word", ["hydra.x=1", "hydra.verbose=[", "hydra/launcher=nowhere"])
def test_what_hydra_refuses_is_one_line(word: str, seen: Seen, capsys: Any) -> None:
    status = cli.main(["generate", "model=x", word])

    said = capsys.readouterr().err
    assert status == cli.FAILED
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert said.endswith("; see --help\n")
    assert seen == []
