"""A request that goes on with tokens it has ends as if it had never been interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnemosyne.kernels.cpu.processor import INSTRUCTION_SETS
from mnemosyne.llm import LLM
from mnemosyne.request import Piece, RequestOutput, SamplingParams
from mnemosyne.serve.async_engine import AsyncEngine
from tests.engines import drain, greedy, open_tiny, pages_used, random_prompts
from tests.model_zoo.tiny import VOCAB_SIZE, tiny_checkpoint
from tests.serve.made_tokenizers import byte_fallback_bpe, byte_level_bpe, words
from tests.serve.scripted import say

PROMPT = random_prompts((37,))[0]
HOT = {"max_tokens": 14, "temperature": 0.9, "top_p": 0.95, "logprobs": 3}
PARAMS = {
    "greedy": greedy(14, logprobs=2, prompt_logprobs=1),
    "drawn": SamplingParams(**HOT, seed=1),
    "repetition": SamplingParams(**HOT, seed=2, repetition_penalty=1.4),
    "counted": SamplingParams(**HOT, seed=3, frequency_penalty=0.4, presence_penalty=0.3),
    "biased": SamplingParams(**HOT, seed=4, top_k=5, logit_bias={3: 2.0, 9: -100.0}),
    "ends": SamplingParams(**HOT, seed=5, min_tokens=6, stop_token_ids=range(0, 96, 2)),
    "three": SamplingParams(**HOT, seed=6, n=3, repetition_penalty=1.2),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "tiny")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with open_tiny(checkpoint, max_tokens=4096) as llm:
        yield llm


def serve(llm: LLM, params: SamplingParams, known: Any = ()) -> tuple[list[RequestOutput], Any]:
    """Outputs, and the pieces of each sample that is wanted."""
    outputs = llm.engine.add(PROMPT, params, known)
    pieces = [piece for step in drain(llm.engine) for piece in step]
    return outputs, [[p for p in pieces if p.request_id == o.request_id] for o in outputs]


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_tokens_and_logprobs_after_any_cut_are_those_of_an_undisturbed_run(
    llm: LLM, params: SamplingParams
) -> None:
    whole, _ = serve(llm, params)
    assert params.stop_token_ids == () or 6 <= len(whole[0].token_ids) < 14, "it ends by a token"

    for cut in range(len(whole[0].token_ids) + 1):
        known = [output.token_ids[: max(0, cut - 2 * i)] for i, output in enumerate(whole)]
        resumed, pieces = serve(llm, params, known)

        for old, new, had, brought in zip(whole, resumed, known, pieces, strict=True):
            assert new.token_ids == old.token_ids
            assert new.finish_reason == old.finish_reason
            assert new.stop_reason == old.stop_reason
            assert [t for p in brought for t in p.token_ids] == old.token_ids[len(had) :]
            assert old.logprobs is not None
            for one, other in zip(new.logprobs, old.logprobs[len(had) :], strict=True):
                assert one.rank == other.rank
                assert one.logprob == pytest.approx(other.logprob, abs=1e-12)
            if params.prompt_logprobs is not None and brought:
                (told,) = [p.prompt_logprobs for p in brought if p.prompt_logprobs is not None]
                assert [entry and entry.token_id for entry in told] == [None, *PROMPT[1:].tolist()]
    assert pages_used(llm.engine) == 0


def test_only_the_samples_that_are_wanted_go_on(llm: LLM) -> None:
    whole, _ = serve(llm, PARAMS["three"])

    resumed, pieces = serve(llm, PARAMS["three"], [None, whole[1].token_ids[:4], None])

    assert [output.token_ids for output in resumed] == [whole[1].token_ids]
    assert {piece.sample for piece in pieces[0]} == {1}


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_bits_of_bfloat16_do_not_change_with_the_kernels_in_cpp(tmp_path: Path, chunk: int) -> None:
    names = [each.name for each in INSTRUCTION_SETS if each.why_not() is None]
    if not names:
        pytest.skip("no C++ kernels for this machine")
    checkpoint, name = tiny_checkpoint(tmp_path / "wide", head_dim=32, mlp_width=64), names[0]
    params = SamplingParams(**{**HOT, "max_tokens": 24}, seed=7, repetition_penalty=1.1)
    with LLM(
        str(checkpoint),
        dtype="bfloat16",
        attention=name,
        operators=name,
        schedule={"chunk": chunk},
        cache={"max_tokens": 2048, "page_size": 16},
    ) as llm:
        (whole,), _ = serve(llm, params)
        for cut in range(1, 24):
            (resumed,), _ = serve(llm, params, [whole.token_ids[:cut]])

            assert resumed.token_ids == whole.token_ids
            assert resumed.logprobs == whole.logprobs[cut:], "each bit of them"


TOKENIZERS = {"byte level": byte_level_bpe(), "byte fallback": byte_fallback_bpe()}
TOKENIZERS["words"] = words()


@settings(max_examples=60)
@given(
    st.sampled_from(list(TOKENIZERS)),
    st.lists(st.integers(0, 10**6), min_size=2, max_size=24),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
    st.lists(st.text("ab é€👩", min_size=1, max_size=3), max_size=3),
    st.integers(0, 5),
    st.booleans(),
)
def test_text_after_any_cut_goes_on_inside_characters_and_stop_strings(
    name: str, script: list[int], prompt: list[int], stop: list[str], min_tokens: int, skip: bool
) -> None:
    backend = TOKENIZERS[name]
    size = backend.get_vocab_size()
    script, prompt = [i % size for i in script], [i % size for i in prompt]
    params = {
        "max_tokens": len(script),
        "stop": stop,
        "min_tokens": min(min_tokens, len(script)),
        "skip_special_tokens": skip,
    }
    pieces: list[Piece] = []
    whole = say(backend, prompt, script, pieces=pieces, **params)
    texts = [piece.text for piece in pieces if piece.token_ids]

    for cut in range(len(whole.token_ids)):
        known, again = whole.token_ids[:cut], list[Piece]()
        resumed = say(backend, prompt, script[cut:], known=known, pieces=again, **params)

        assert [p.text for p in again if p.token_ids] == texts[cut:]
        assert resumed.text == whole.text
        assert (resumed.finish_reason, resumed.stop_reason) == (
            *(whole.finish_reason, whole.stop_reason),
        )


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ([[1], [2]], "each of n=1 samples, got 2"),
        ([[VOCAB_SIZE]], r"ids in \[0, 96\), got 96"),
        ([[-1]], r"got -1"),
        ([[1] * 9], "at most max_tokens=8 tokens of a sample, got 9"),
        ([[1, 7, 2]], "end where the request ends, got 2 after its end by 'stop'"),
    ],
)
def test_given_tokens_that_cannot_be_are_refused(llm: LLM, known: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        llm.engine.add(PROMPT, greedy(8, stop_token_ids=[7]), known)

    assert not llm.engine.has_work


def test_a_stream_whose_tokens_were_all_there_still_tells_its_end(llm: LLM) -> None:
    (whole, other, _), _ = serve(llm, PARAMS["three"])

    async def main() -> list[Piece]:
        known = [whole.token_ids, other.token_ids[:-1], None]
        async with AsyncEngine(llm.engine) as engine:
            return [piece async for piece in engine.submit(PROMPT, PARAMS["three"], known)]

    pieces = asyncio.run(main())

    ends = {piece.sample: piece for piece in pieces if piece.finish_reason}
    assert {sample: piece.finish_reason for sample, piece in ends.items()} == {
        **{0: "length", 1: "length"},
    }
    assert ends[1].token_ids == (other.token_ids[-1],)
