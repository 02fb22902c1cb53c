"""A request samples by its own parameters, whatever its company and however its prompt is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.haystack import END, cycle, haystack, ids_of, text_of
from mnemosyne.model_zoo.needle import write_needle
from mnemosyne.request import RequestOutput, SamplingParams
from mnemosyne.runtime.worker import LOGPROB_ROWS
from tests.engines import greedy, model_of, open_tiny, random_prompts
from tests.model_zoo.dense import dense_context
from tests.model_zoo.tiny import VOCAB_SIZE, tiny_checkpoint

PROMPTS = random_prompts((30, 7, 51, 18, 2))
HOT = {"max_tokens": 20, "temperature": 0.9, "top_p": 0.95, "logprobs": 3}
MIXED = [
    SamplingParams(**HOT, seed=1),
    SamplingParams(**HOT, seed=2, repetition_penalty=1.3, frequency_penalty=0.2),
    greedy(20, presence_penalty=0.5, logprobs=3),
    SamplingParams(**HOT, seed=4, top_k=5, min_p=0.05, logit_bias={3: 2.0, 9: -100.0}),
    SamplingParams(**{**HOT, "max_tokens": 9}, seed=1, min_tokens=5, stop_token_ids=[1, 2, 3]),
]
DAYS = cycle("days", 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sampling") / "tiny")


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[RequestOutput]:
    """Each prompt by itself, in one chunk."""
    with open_tiny(checkpoint, chunk=64) as llm:
        return [llm.generate(p, s)[0] for p, s in zip(PROMPTS, MIXED, strict=True)]


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint) as llm:
        yield llm


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The needle model: it speaks, and what it will say is known."""
    path = write_needle(tmp_path_factory.mktemp("sampling") / "needle")
    cache = {"max_tokens": "4K"}
    with LLM(str(path), dtype="float32", schedule={"chunk": 64}, cache=cache) as llm:
        yield llm


def assert_same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for output, other in zip(outputs, expected, strict=True):
        assert output.token_ids == other.token_ids
        assert output.finish_reason == other.finish_reason
        assert [entry.rank for entry in output.logprobs] == [e.rank for e in other.logprobs]
        np.testing.assert_allclose(
            [entry.logprob for entry in output.logprobs],
            [entry.logprob for entry in other.logprobs],
            atol=1e-12,
        )


@pytest.mark.parametrize("chunk", [1, 7, 64, "adaptive"])
def test_a_seed_gives_the_same_tokens_in_any_company_and_any_chunks(
    checkpoint: Path, alone: list[RequestOutput], chunk: int | str
) -> None:
    with open_tiny(checkpoint, chunk=chunk, target_tbt=0.005) as llm:
        outputs = llm.generate(PROMPTS, MIXED)
        reverse = llm.generate(PROMPTS[::-1], MIXED[::-1])

    assert_same(outputs, alone)
    assert_same(reverse[::-1], alone)


def test_a_seed_gives_the_same_tokens_beside_its_own_copies(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    outputs = llm.generate([PROMPTS[0]] * 5, MIXED[0])

    assert_same(outputs, [alone[0]] * 5)


def test_other_seeds_give_other_tokens(llm: LLM) -> None:
    params = [SamplingParams(**HOT, seed=seed) for seed in range(8)]

    outputs = llm.generate([PROMPTS[0]] * 8, params)

    assert len({tuple(output.token_ids) for output in outputs}) == 8


def test_without_a_seed_each_request_draws_its_own(llm: LLM) -> None:
    outputs = llm.generate([PROMPTS[0]] * 6, SamplingParams(**HOT))

    assert len({tuple(output.token_ids) for output in outputs}) == 6


def test_the_first_of_n_samples_is_the_only_one_and_the_others_differ(
    llm: LLM, alone: list[RequestOutput]
) -> None:
    params = SamplingParams(**HOT, seed=1, n=4)

    samples = llm.generate(PROMPTS[0], params)[0].samples
    again = llm.generate(PROMPTS[:3], params)[0].samples

    assert_same(samples[:1], alone[:1])
    assert_same(again, samples)
    assert len({tuple(sample.token_ids) for sample in samples}) == 4


def test_logprobs_belong_to_the_tokens_and_are_those_of_a_dense_forward(llm: LLM) -> None:
    output = llm.generate(PROMPTS[2], SamplingParams(**HOT, seed=3))[0]

    ids = np.concatenate([PROMPTS[2], output.token_ids])
    dense_TV = dense_logits(llm, ids).log_softmax(-1)[len(PROMPTS[2]) - 1 : -1]
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry, row_V in zip(output.logprobs, dense_TV, strict=True):
        assert entry.logprob == pytest.approx(row_V[entry.token_id].item(), abs=1e-10)
        top = row_V.topk(3)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        np.testing.assert_allclose([lp for _, lp in entry.top], top.values, atol=1e-10)


def dense_logits(llm: LLM, ids: np.ndarray) -> Tensor:
    """Logits ``[T, V]`` of one forward over all tokens, without a cache."""
    model = model_of(llm)
    context = dense_context(model.spec.windows)
    with torch.inference_mode():
        return model.logits(model(torch.from_numpy(ids), torch.arange(len(ids)), context))


@pytest.mark.parametrize("chunk", [1, 7, 300, 700])
def test_prompt_logprobs_are_those_of_a_dense_forward(checkpoint: Path, chunk: int) -> None:
    prompt, short = random_prompts((600, 1), seed=1)
    with open_tiny(checkpoint, chunk=chunk) as llm:
        params = greedy(2, prompt_logprobs=2)
        _, output, lone = llm.generate([PROMPTS[1], prompt, short], [greedy(40), params, params])
        dense_TV = dense_logits(llm, prompt).log_softmax(-1)[:-1]

    assert lone.prompt_logprobs == [None]
    assert output.prompt_logprobs[0] is None
    entries = output.prompt_logprobs[1:]
    assert [entry.token_id for entry in entries] == prompt[1:].tolist()
    expected_T = dense_TV.gather(-1, torch.from_numpy(prompt)[1:, None])[:, 0]
    actual_T = torch.tensor([entry.logprob for entry in entries], dtype=torch.float64)
    assert (actual_T - expected_T).abs().max() < 1e-10
    ranks_T = (dense_TV > expected_T[:, None]).sum(-1) + 1
    assert [entry.rank for entry in entries] == ranks_T.tolist()
    assert [entry.top[0][0] for entry in entries] == dense_TV.argmax(-1).tolist()
    assert {len(entry.top) for entry in entries} == {2}


def test_prompt_logprobs_never_hold_more_than_256_rows_of_logits(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_prompts((900,))[0]
    num_rows: list[int] = []
    with open_tiny(checkpoint, chunk=900) as llm:
        logits = model_of(llm).logits

        def watched(hidden_BE: Tensor) -> Tensor:
            num_rows.append(len(hidden_BE))
            return logits(hidden_BE)

        monkeypatch.setattr(model_of(llm), "logits", watched)
        output = llm.generate(prompt, greedy(1, prompt_logprobs=0))[0]

    assert num_rows == [256, 256, 256, 131, 1]
    assert LOGPROB_ROWS == 256
    assert len(output.prompt_logprobs) == 900


def test_a_banned_token_never_comes_and_a_favoured_one_always(llm: LLM) -> None:
    allowed = {17, 40}
    ban = {token: -1e9 for token in range(VOCAB_SIZE) if token not in allowed}

    few, one = llm.generate(
        [PROMPTS[0]] * 2,
        [
            SamplingParams(max_tokens=30, temperature=2.0, seed=0, logit_bias=ban),
            SamplingParams(max_tokens=5, temperature=1.0, seed=0, logit_bias={23: 1e6}),
        ],
    )

    assert set(few.token_ids) == allowed
    assert one.token_ids == [23] * 5


def test_a_stop_string_cuts_the_text_and_is_the_reason(reciter: LLM) -> None:
    stop = ["day thurs", "sunday monday tuesday", "never"]
    output = reciter.generate(DAYS.prompt_ids, greedy(24, stop=stop))[0]

    assert output.finish_reason == "stop"
    assert output.stop_reason == "day thurs"
    assert output.text == " tuesday wednes"  # a word begins with its space
    assert output.token_ids == DAYS.answer_ids[:3].tolist()


def test_a_stop_string_does_not_count_before_min_tokens(reciter: LLM) -> None:
    output = reciter.generate(DAYS.prompt_ids, greedy(24, stop="thursday", min_tokens=5))[0]

    assert output.finish_reason == "stop"
    assert output.text.split() == text_of(DAYS.answer_ids).split()[:9]


def test_pieces_hold_nothing_of_a_stop_string(reciter: LLM) -> None:
    stop = "saturday sunday"
    pieces = [piece for _, piece in reciter.stream(DAYS.prompt_ids, greedy(24, stop=stop))]

    assert "".join(piece.text for piece in pieces).split() == (
        ["tuesday", "wednesday", "thursday", "friday"]
    )
    assert pieces[-1].finish_reason == "stop"


def test_stop_ids_end_a_request_and_are_its_reason(reciter: LLM) -> None:
    friday, sunday = (int(i) for i in ids_of(["friday", "sunday"]))
    params = greedy(24, stop_token_ids=[sunday, friday])

    output = reciter.generate(DAYS.prompt_ids, params)[0]
    later = reciter.generate(DAYS.prompt_ids, greedy(24, stop_token_ids=[friday], min_tokens=1))[0]

    for ended in (output, later):
        assert ended.finish_reason == "stop"
        assert ended.stop_reason == friday
        assert ended.token_ids[-1] == friday
        assert ended.text.split() == ["tuesday", "wednesday", "thursday"]


def test_the_end_token_of_the_model_ends_a_request_unless_ignored(reciter: LLM) -> None:
    hay = haystack(100)
    num_answer = len(hay.answer_ids)
    end = int(ids_of([END])[0])

    ended, ignored = reciter.generate(
        [hay.prompt_ids] * 2, [greedy(num_answer + 5), greedy(num_answer + 5, ignore_eos=True)]
    )

    assert ended.token_ids == hay.answer_ids.tolist()
    assert (ended.finish_reason, ended.stop_reason) == ("stop", end)
    assert ignored.token_ids[:num_answer] == hay.answer_ids.tolist()
    assert len(ignored.token_ids) == num_answer + 5
    assert (ignored.finish_reason, ignored.stop_reason) == ("length", None)


def test_no_end_token_comes_before_min_tokens(reciter: LLM) -> None:
    hay = haystack(100)
    num_answer = len(hay.answer_ids)
    end = int(ids_of([END])[0])

    output = reciter.generate(hay.prompt_ids, greedy(40, min_tokens=num_answer + 4))[0]

    assert output.token_ids[: num_answer - 1] == hay.answer_ids[:-1].tolist()
    assert len(output.token_ids) >= num_answer + 4
    assert end not in output.token_ids[: num_answer + 4]


def test_max_tokens_is_the_exact_number(llm: LLM) -> None:
    outputs = llm.generate(PROMPTS[:3], [greedy(1), greedy(2), greedy(33)])

    assert [len(output.token_ids) for output in outputs] == [1, 2, 33]
    assert {output.finish_reason for output in outputs} == {"length"}
    assert {output.stop_reason for output in outputs} == {None}
