"""Every program in examples/ runs as it is and says what it is there to say."""

from __future__ import annotations

import io
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.needle import write_needle
from tests.ranks import run_ranks
from tools.live_server import serving

EXAMPLES = Path(__file__).parents[1] / "examples"
RECITED = "my name is raven and my house is on the hill of maple"


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_needle(tmp_path_factory.mktemp("needle") / "needle"))


@pytest.fixture(autouse=True)
def no_sweep() -> Iterator[None]:
    """Start from the roofline: to measure how long steps take costs seconds at each start."""
    with patch("mnemosyne.joining.step_times.sweep", lambda *_, **__: {}):
        yield


def run(name: str, *arguments: str) -> str:
    """Run a program with these words after its name; what it prints."""
    words, sys.argv = sys.argv, [f"examples/{name}.py", *arguments]
    try:
        with redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = words
    return printed.getvalue()


def run_on_rank(name: str, *arguments: str) -> str:
    with patch("mnemosyne.joining.step_times.sweep", lambda *_, **__: {}):
        return run(name, *arguments)


def test_offline_samples_each_prompt_in_its_own_way(needle: str) -> None:
    first, second = run("offline", needle).splitlines()

    assert first.startswith("'In the morning' -> ")
    assert first.endswith("(length)")
    assert second == f"'The river was' -> {' river' * 12!r} (length)"


def test_streaming_reads_a_file_and_answers_about_it(
    needle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(RECITED)

    printed = run("streaming", str(text), "my name is", needle)

    assert printed.startswith(" raven and my ")
    assert "refused" not in capsys.readouterr().err


def test_coroutines_are_served_together_and_one_leaves_early(needle: str) -> None:
    river, morning, _ = run("coroutines", needle).splitlines()

    assert river == repr(" river" * 12)
    assert morning == repr(" morning" * 24)


def test_chat_finds_earlier_turns_in_the_cache(
    needle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter([RECITED, "my name is", ""])
    monkeypatch.setattr("builtins.input", lambda sign: next(lines))

    printed = run("chat", needle)

    cached = [int(line[1:].split()[0]) for line in printed.splitlines() if "from the cache" in line]
    assert cached[0] == 0
    assert cached[1] >= 64
    assert "raven" in printed


def test_the_client_of_openai_reads_a_stream(smollm2: Path) -> None:
    with (
        LLM(str(smollm2), schedule={"chunk": 64}, cache={"max_tokens": 1024}) as llm,
        serving(llm.engine, access_log=False) as live,
    ):
        printed = run("openai_client", live.url)

    assert "Paris" in printed


def test_a_mesh_gives_its_outputs_on_the_driver_alone(needle: str) -> None:
    first, second = run_ranks(run_on_rank, 2, "mesh", needle)

    assert first.endswith("on 2 groups\n")
    assert "river" in first
    assert second == ""


def test_a_predictor_of_ones_own_decides_the_chunks(needle: str) -> None:
    chunks, *steps = run("predictor", needle).splitlines()

    assert sum(map(int, chunks.rpartition(": ")[2].split())) == 601
    assert len(steps) == 4


def test_attention_alone_merges_parts_exactly() -> None:
    assert float(run("attention").split()[-1]) < 1e-6


def test_planning_names_a_layout_for_each_number_of_gpus() -> None:
    lines = run("planning", "llama3_8b", "h100", "256K").splitlines()

    said = [line for line in lines if " GPUs: " in line]
    assert [line.partition(";")[0] for line in said] == ["8 GPUs: hold it", "16 GPUs: hold it"]


def test_each_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")

    assert len(list(EXAMPLES.glob("*.py"))) >= 9
    assert [path.stem for path in EXAMPLES.glob("*.py") if f'"{path.stem}"' not in source] == []
