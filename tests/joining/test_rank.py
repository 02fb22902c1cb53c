"""Config in, engine out: what is chosen, what is measured, what is said at start-up."""

from __future__ import annotations

import logging
from math import isnan
from pathlib import Path

import pytest
import torch

from mnemosyne.config import CacheConfig, EngineConfig, ScheduleConfig
from mnemosyne.joining.device import choose_device
from mnemosyne.joining.rank import build_rank, describe_reads
from mnemosyne.joining.real import build_engine
from mnemosyne.schedule.predictor import LinearPredictor
from mnemosyne.schedule.work import StepWork
from tests.engines import greedy, open_tiny, worker_of
from tests.model_zoo.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("build") / "tiny", family="mistral", window=24)


def config(checkpoint: Path, chunk: int | str = 8) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint),
        device="cpu",
        schedule=ScheduleConfig(chunk=chunk, target_tbt=0.01),
        cache=CacheConfig(max_tokens=1024, page_size=16),
    )


def test_start_up_says_what_runs_and_what_fits(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mnemosyne")

    rank = build_rank(config(checkpoint))

    room = "mnemosyne.joining.rank"
    said = [record.getMessage() for record in caplog.records if record.name == room]
    num_bytes = sum(p.nbytes for p in rank.worker._model.parameters())
    assert said == [
        f"weights read: {num_bytes / 1e6:.1f} MB",
        f"{checkpoint}, torch.float64 on cpu, cpu attention, torch operators",
        "KV cache: 1,024 tokens in 0.00 GiB; requests that fit: "
        "16 of 1M or 16 of 128K or 16 of 8K or 16 of 1K",  # each keeps its window alone
    ]


def test_what_every_rank_of_a_mesh_read_is_said_in_one_line() -> None:
    assert describe_reads([1_400_000, 12_340_000_000]) == "weights read: 1.4, 12,340.0 MB by rank"


def test_adaptive_chunks_are_fitted_to_the_machine_and_fixed_ones_are_not(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mnemosyne")
    num_steps = {}
    for chunk in (8, "adaptive"):
        told = config(checkpoint, chunk)
        engine = build_engine(build_rank(told), told)
        engine.measure()
        predictor = engine.scheduler.predictor
        assert isinstance(predictor, LinearPredictor)
        assert min(predictor.coefficients) >= 0
        num_steps[chunk] = len(predictor.samples)

    assert num_steps[8] == 0 < num_steps["adaptive"]
    assert sum("step times fitted" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("n", "num_prompts"), [(1, 2), (2, 1)])
def test_step_times_are_measured_once_there_is_somebody_to_protect(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, n: int, num_prompts: int
) -> None:
    caplog.set_level(logging.INFO, logger="mnemosyne")

    def num_sweeps() -> int:
        return sum("step times fitted" in record.getMessage() for record in caplog.records)

    with open_tiny(checkpoint, chunk="adaptive", saved_fit=False) as llm:
        assert 0 < llm.engine.scheduler.prefill_s(1000) < 60
        (alone,) = llm.generate([1, 2, 3], greedy(5))
        assert num_sweeps() == 0
        assert isnan(llm.engine.prediction_error()[50])
        outputs = llm.generate([[1, 2, 3]] * num_prompts, greedy(5, n=n))
        assert num_sweeps() == 1
        assert llm.engine.prediction_error()[50] > 0
        assert {tuple(output.token_ids) for output in outputs} == {tuple(alone.token_ids)}
        llm.generate([[1, 2], [3, 4]], greedy(2))

    assert num_sweeps() == 1


def test_a_predictor_of_ones_own_is_not_fitted(checkpoint: Path) -> None:
    predictor = LinearPredictor()

    told = config(checkpoint, "adaptive")
    engine = build_engine(build_rank(told), told, predictor=predictor)
    engine.measure()

    assert engine.scheduler.predictor.predict(StepWork(num_tokens=1)) == 0.0
    assert predictor.coefficients == ()


def test_a_cache_too_small_for_the_sweep_learns_from_its_steps(checkpoint: Path) -> None:
    with open_tiny(checkpoint, chunk="adaptive", max_tokens=16) as llm:
        llm.engine.measure()
        before = llm.engine.scheduler.predictor.coefficients
        (output,) = llm.generate([1, 2, 3], greedy(5))
        assert llm.engine.scheduler.predictor.coefficients != before

    assert len(output.token_ids) == 5


def test_the_sweep_leaves_no_request_and_no_page_behind(checkpoint: Path) -> None:
    with open_tiny(checkpoint, chunk="adaptive") as llm:
        llm.engine.measure()
        assert worker_of(llm)._sequences == {}
        assert llm.engine.scheduler.ledger.num_used == 0
        assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", torch.float64), ("float32", torch.float32)]
)
def test_the_dtype_is_that_of_the_checkpoint_unless_given(
    checkpoint: Path, given: str, expected: torch.dtype
) -> None:
    chosen = config(checkpoint)
    chosen.dtype = given

    worker = build_rank(chosen).worker

    assert worker._model.dtype == expected
    assert worker._pool.k[0].dtype == expected


def test_devices_are_chosen_by_name() -> None:
    usual = "cuda" if torch.cuda.is_available() else "cpu"

    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == usual
    for name in ("", "cpu:x", "gpu", "meta", "cuda:-1", "cuda:64"):
        with pytest.raises(ValueError, match=r"^device must be .*; use "):
            choose_device(name)


def test_a_gpu_by_its_index_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cuda", num_processes=2) == torch.device("cuda")
    with pytest.raises(ValueError, match=r"for 2 processes, got 'cuda:1'; use device=cuda, "):
        choose_device("cuda:1", num_processes=2)
