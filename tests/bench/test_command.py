"""`mnemosyne bench` as a user runs it, over engines in processes of their own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mnemosyne import cli
from mnemosyne.config_bench import BenchConfig
from tests.model_zoo.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("bench") / "tiny")


def test_two_engines_give_the_same_tokens_and_a_table(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, plot = tmp_path / "bench.json", tmp_path / "bench.png"

    status = cli.main(
        [
            "bench",
            f"model={checkpoint}",
            "dtype=float64",
            "peers=[transformers]",
            "lengths=[40,90]",
            "max_tokens=10",
            "runs=2",
            "threads=1",
            f"output={output}",
            f"plot={plot}",
        ]
    )

    printed = capsys.readouterr()
    assert status == cli.OK, printed.err
    assert "40: the first 10 of 10 greedy tokens agree" in printed.out
    assert "90: the first 10 of 10 greedy tokens agree" in printed.out
    results = json.loads(output.read_text())["results"]
    assert [(r["case"], r["engine"], len(r["runs"])) for r in results] == [
        (case, engine, 2) for case in ("40", "90") for engine in ("mnemosyne", "transformers")
    ]
    assert plot.exists()


@pytest.mark.parametrize("start", [False, True])
def test_a_peer_that_fails_leaves_the_others_results_and_its_reason(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], start: bool
) -> None:
    output = tmp_path / "bench.json"

    status = cli.main(
        [
            *("bench", f"model={checkpoint}", "dtype=float64", "peers=[vllm,llamacpp]"),
            *(f"vllm_python={sys.executable}", "lengths=[40]", "max_tokens=10", "runs=1"),
            *(f"output={output}", "plot=null", f"start={start}"),
        ]
    )

    printed = capsys.readouterr()
    assert status == cli.FAILED
    content = json.loads(output.read_text())
    assert [r["engine"] for r in content["results"]] == ["mnemosyne"]
    assert "No module named 'vllm'" in content["settings"]["failures"]["vllm"]
    assert "dtype must be one" in content["settings"]["failures"]["llamacpp"]
    assert "llamacpp: left out, dtype must be one that llama.cpp has" in printed.out
    assert "all runs" in printed.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["peers=[vllm]", "vllm_python=/no/such/python"], "vllm_python must be an interpreter"),
        (["peers=[vllm]", f"vllm_python={sys.executable}"], "No module named 'vllm'"),
        (["output=/no/such/folder/x"], "output must be a file that can be written"),
        (["peers=[vlm]"], "peers must be among transformers, vllm, llamacpp, got 'vlm'"),
        (["lengths=[]"], "lengths must be one length or more"),
        (["runs=0"], "runs must be >= 1, got 0"),
        (["mesh.tp=2"], "mesh must be one process for bench, got 2"),
        (["lenghts=[1]"], "did you mean lengths"),
        (["lengths=[40,1M]", "max_tokens=8"], "positions, got 1048584 in 1024K; shorten them"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    words: list[str],
    said: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = [f"model={checkpoint}", f"output={tmp_path / 'bench.json'}", "plot=null"]
    base += [] if any(word.startswith("lengths") for word in words) else ["lengths=[40]"]
    base += ["ours=false"] if any("vllm" in word for word in words) else []

    status = cli.main(["bench", *(w for w in base if w.split("=")[0] not in words[0]), *words])

    printed = capsys.readouterr()
    assert status == cli.FAILED
    assert said in printed.err
    assert "Traceback" not in printed.err.split("it last said")[0]


def test_sizes_are_counts_once_they_are_checked() -> None:
    config = BenchConfig(lengths=["16K", 5], beside="1K")

    assert (config.lengths, config.beside) == ([16384, 5], 1024)
