"""Decode steps that are recorded on the CPU: the bits of computed ones, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mnemosyne.attention import NativeBackend
from mnemosyne.attention.handing import Handing
from mnemosyne.kernels.cpu.processor import AVX512, INSTRUCTION_SETS
from mnemosyne.kernels.cpu.tape import Tape
from mnemosyne.llm import LLM
from mnemosyne.runtime.graphs import DecodeGraphs, record_decodes
from mnemosyne.runtime.inputs import StepInputs
from mnemosyne.runtime.worker import Worker
from tests.engines import greedy, random_prompts, worker_of
from tests.model_zoo.tiny import tiny_checkpoint

pytestmark = [
    pytest.mark.skipif(AVX512.why_not() is not None, reason=str(AVX512.why_not())),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

NUM_TOKENS = 10
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def open_bfloat16(
    path: Path, attention: str = "avx512", compile: str = "none", **options: Any
) -> LLM:
    return LLM(
        str(path),
        device="cpu",
        dtype="bfloat16",
        attention=attention,
        compile=compile,
        schedule={"chunk": 48},  # no more rows than FEW_ROWS: the products are ours
        cache={"max_tokens": 2048, "page_size": 16},
        **options,
    )


def write_checkpoint(path: Path, family: str = "llama", **options: Any) -> Path:
    return tiny_checkpoint(path, family=family, head_dim=32, mlp_width=64, **options)


def graphs_of(worker: Worker) -> DecodeGraphs:
    assert isinstance(worker._backend, NativeBackend)
    return record_decodes(
        *(worker._model, worker._layers, worker._pool, worker._backend, worker._operators),
        rows=(1, 2, 4),
    )


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        *((family, "avx512") for family in FAMILIES),
        *(("mistral", "amx"), ("llama", "avx512f"), ("qwen3", "avx2")),
    ],
)
def test_replayed_steps_have_the_bits_of_computed_ones(
    family: str, attention: str, tmp_path: Path
) -> None:
    (instructions,) = (each for each in INSTRUCTION_SETS if each.name == attention)
    if (why_not := instructions.why_not()) is not None:
        pytest.skip(why_not)
    window = 24 if family == "mistral" else None
    with open_bfloat16(
        write_checkpoint(tmp_path / "tiny", family, window=window), attention
    ) as llm:
        worker, held = worker_of(llm), []
        graphs, computed = graphs_of(worker), worker._forward_pass

        def forward_pass(inputs: StepInputs, handing: Handing | None) -> Callable[[Tensor], Tensor]:
            compute = computed(inputs, handing)
            if not graphs.holds(inputs):
                return compute

            def both(x: Tensor) -> Tensor:
                hidden_TE = compute(x)
                written = [pool.clone() for pool in (*worker._pool.k, *worker._pool.v)]
                held.append(len(inputs.batch.segments))
                assert torch.equal(graphs.run(inputs), hidden_TE)
                assert all(map(torch.equal, (*worker._pool.k, *worker._pool.v), written))
                return hidden_TE

            return both

        worker._forward_pass = forward_pass  # type: ignore[method-assign]
        for lengths in ((1, 33, 41), (40,)):
            llm.generate(random_prompts(lengths), greedy(NUM_TOKENS))

    assert {1, 3} <= set(held)  # three rows and one of padding
    assert len(held) >= 2 * (NUM_TOKENS - 1)


def test_a_step_is_one_call(tmp_path: Path) -> None:
    with open_bfloat16(write_checkpoint(tmp_path / "tiny", num_layers=3)) as llm:
        graphs = graphs_of(worker_of(llm))

    assert [len(captured.graph) for captured in graphs._captured.values()] == [1, 1, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["step", "auto"])
def test_every_decode_is_replayed_and_other_steps_are_those_of_an_eager_engine(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replays, replay = write_checkpoint(tmp_path / "tiny"), [], Tape.replay
    prompts = random_prompts((1, 1, 1))  # a prompt of one token is a decode by its shape
    longer = random_prompts((3, 65, 1, 90, 17, 2))
    with open_bfloat16(path) as llm:
        expected = [llm.generate(p, greedy(NUM_TOKENS))[0].token_ids for p in prompts]
        expected_longer = llm.generate(longer, greedy(NUM_TOKENS, prompt_logprobs=1))
    monkeypatch.setattr(Tape, "replay", lambda tape: (replays.append(tape), replay(tape)))

    before = counters["stats"]["unique_graphs"]
    with open_bfloat16(path, compile=mode) as llm:
        outputs = [llm.generate(p, greedy(NUM_TOKENS))[0].token_ids for p in prompts]
        assert len(replays) == len(prompts) * NUM_TOKENS
        outputs_longer = llm.generate(longer, greedy(NUM_TOKENS, prompt_logprobs=1))

    assert counters["stats"]["unique_graphs"] == before
    assert outputs == expected
    for output, expected_one in zip(outputs_longer, expected_longer, strict=True):
        assert output.token_ids == expected_one.token_ids
        assert output.prompt_logprobs == expected_one.prompt_logprobs
    assert len(replays) > len(prompts) * NUM_TOKENS


@pytest.mark.parametrize("choices", [{"attention": "cpu"}, {"operators": "torch"}], ids=str)
def test_unless_all_of_a_step_is_kernels_auto_records_and_compiles_nothing(
    choices: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[Tape] = []
    monkeypatch.setattr(Tape, "replay", replays.append)
    before = counters["stats"]["unique_graphs"]
    with open_bfloat16(write_checkpoint(tmp_path / "tiny"), compile="auto", **choices) as llm:
        (output,) = llm.generate(random_prompts((5,)), greedy(NUM_TOKENS))

    assert len(output.token_ids) == NUM_TOKENS
    assert replays == []
    assert counters["stats"]["unique_graphs"] == before
