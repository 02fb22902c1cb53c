"""``mnemosyne demo``: what it prints, draws and returns, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mnemosyne import cli
from mnemosyne.cli import demo as demo_module
from mnemosyne.model_zoo.haystack import Recital, haystack, text_of
from mnemosyne.process import INTERRUPTED
from mnemosyne.serve.engine import Engine
from tests.caches import empty_cache


@pytest.fixture(scope="module", autouse=True)
def needle_home(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Where the needle model is written, once for all tests here."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = empty_cache(tmp_path_factory.mktemp("cache"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture
def demo(tmp_path: Path) -> Callable[..., int]:
    """The demo on a short text; it draws ``plot.png``."""

    def run(*words: str) -> int:
        small = ["length=2K", "num_short=3", "schedule=fixed", "cache.max_tokens=4K"]
        return cli.main(["demo", *small, f"plot={tmp_path / 'plot.png'}", *words])

    return run


def test_it_finds_the_passkey_shows_times_and_draws(
    demo: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = demo()

    printed = capsys.readouterr().out
    passkey = text_of(haystack(2048, depth=0.5, seed=0).answer_ids)
    assert status == demo_module.FOUND
    assert "mnemosyne serve model=/path/to/model" in printed
    assert f"hidden:  {passkey}\nread:    {passkey}\npasskey found in 2,048 tokens" in printed
    for name in ("TTFT", "TBT"):
        for label in ("without the long prompt", "with it"):
            assert re.search(rf"{name} +│ {label} +(│ +\d+\.\d ){{3}}│", printed)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_passkey_that_is_not_read_back_is_its_exit_status(
    demo: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def misremembered(*arguments: int, **keywords: int) -> Recital:
        recital = haystack(*arguments, **keywords)
        return replace(recital, answer_ids=recital.answer_ids[::-1])

    monkeypatch.setattr(demo_module, "haystack", misremembered)

    status = demo()

    assert status == demo_module.NOT_FOUND
    assert "passkey NOT FOUND" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["smollm2", "bench", "/models/none"])
def test_a_model_that_does_not_know_its_texts_is_refused(
    demo: Callable[..., int], capsys: pytest.CaptureFixture[str], model: str
) -> None:
    assert demo(f"model={model}") == 2

    assert f"model must be needle in the demo, got '{model}'" in capsys.readouterr().err


def test_it_runs_without_short_requests(
    demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo("num_short=0") == demo_module.FOUND
    assert "nan" not in capsys.readouterr().out


def test_ctrl_c_ends_it_with_130(
    demo: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, num_steps = Engine.step, 0

    def interrupted(engine: Engine) -> object:
        nonlocal num_steps
        num_steps += 1
        if any(len(o.prompt_token_ids) > 1000 for o in engine.unfinished()):
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)

    status = demo()

    assert status == INTERRUPTED
    assert num_steps > 1
    assert "interrupted: the passkey was not read back" in capsys.readouterr().err
    assert not (tmp_path / "plot.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plot=/no/such/folder/run.png"], "plot must be a .png file in a directory that exists"),
        (["plot=run.doc"], "plot must be a .png file"),
        (["depth=1.5"], "depth must lie in [0, 1], got 1.5"),
        (["length=5"], "num_tokens must be >= 10 to hold the passkey, got 5"),
        (["num_short=-1"], "num_short must be >= 0, got -1"),
        (["lenght=5K"], "did you mean length?"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, demo: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    status = demo(*words)

    lines = capsys.readouterr().err.splitlines()
    assert status == cli.FAILED
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]
