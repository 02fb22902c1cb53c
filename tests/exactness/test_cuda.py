"""The same claims on a GPU, with every backend that runs there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.haystack import cycle, haystack
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import SamplingParams
from mnemosyne.runtime.graphs import CudaGraph
from tests.engines import greedy, open_tiny, random_prompts, worker_of
from tests.model_zoo.tiny import tiny_checkpoint

pytestmark = pytest.mark.gpu

PROMPTS = random_prompts((1, 5, 16, 33, 64, 97, 130, 41))
BACKENDS = ("flex", "reference", "triton")


@pytest.fixture(scope="module", params=["default", "yarn"])
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("cuda") / request.param
    return tiny_checkpoint(path, rope=request.param)


@pytest.mark.parametrize("chunk", [7, 64, "adaptive"])
def test_float64_tokens_on_cuda_are_those_of_the_cpu(checkpoint: Path, chunk: int | str) -> None:
    params = [greedy(32), SamplingParams(max_tokens=32, temperature=0.9, seed=1)] * 4
    with open_tiny(checkpoint) as llm:
        expected = [output.token_ids for output in llm.generate(PROMPTS, params)]

    with open_tiny(checkpoint, chunk=chunk, device="cuda", attention="reference") as llm:
        outputs = llm.generate(PROMPTS, params)

    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    assert [output.token_ids for output in outputs] == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_passkey_is_found_on_cuda_beside_short_requests(
    tmp_path: Path, dtype: str, attention: str, depth: float
) -> None:
    recitals = [haystack(4096, depth=depth), cycle("days", 30), cycle("greek", 30)]
    with LLM(
        str(write_needle(tmp_path / "needle")),
        dtype=dtype,
        device="cuda",
        attention=attention,
        schedule={"chunk": 512},
        cache={"max_tokens": "8K"},
    ) as llm:
        outputs = llm.generate(
            [recital.prompt_ids for recital in recitals],
            [greedy(len(recital.answer_ids)) for recital in recitals],
        )

    assert [o.token_ids for o in outputs] == [r.answer_ids.tolist() for r in recitals]


@pytest.mark.parametrize("num_prompts", [1, 3, len(PROMPTS)])
def test_decodes_that_are_replayed_give_the_tokens_of_the_cpu(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_prompts: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with open_tiny(checkpoint) as llm:
        expected = llm.generate(PROMPTS[:num_prompts], greedy(32))

    with open_tiny(checkpoint, device="cuda", attention="triton", compile="step") as llm:
        replays = []
        replay = CudaGraph.replay
        monkeypatch.setattr(CudaGraph, "replay", lambda graph: replays.append(replay(graph)))
        before = counters["stats"]["unique_graphs"]
        outputs = llm.generate(PROMPTS[:num_prompts], greedy(32))

    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert len(replays) >= 16
    assert counters["stats"]["unique_graphs"] == before, "a step compiled something"


def test_decodes_are_replayed_with_the_triton_kernels_alone(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="attention must be triton for compile=step on a GPU"):
        open_tiny(checkpoint, device="cuda", attention="reference", compile="step")


def test_auto_takes_the_gpu_and_a_backend_that_runs_there(tmp_path: Path) -> None:
    with LLM(
        str(write_needle(tmp_path / "needle")),
        schedule={"chunk": 512},
        cache={"max_tokens": "4K"},
    ) as llm:
        worker = worker_of(llm)
        (output,) = llm.generate(cycle("days", 9).prompt_ids, greedy(9))

    assert worker._pool.k[0].is_cuda
    assert next(iter(worker._model.parameters())).is_cuda
    assert worker._backend.name == "triton"
    assert output.token_ids == cycle("days", 9).answer_ids.tolist()


def test_closing_gives_the_memory_of_the_device_back(checkpoint: Path) -> None:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    with open_tiny(checkpoint, device="cuda", attention="reference") as llm:
        llm.generate(PROMPTS, greedy(4))
        assert torch.cuda.memory_allocated() > before

    assert torch.cuda.memory_allocated() == before
