"""The door: what becomes of a prompt and its parameters when they are accepted."""

from __future__ import annotations

import numpy as np
import pytest

from mnemosyne.request import NUM_SEEDS, SamplingParams
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.intake import Intake
from mnemosyne.serve.tokenizer import Tokenizer
from tests.serve.made_tokenizers import byte_level_bpe, words

DEFAULTS = GenerationDefaults(end_token_ids=(7, 9), temperature=0.6, top_p=0.9, top_k=20)


def intake(tokenizer: Tokenizer | None = None) -> Intake:
    return Intake(
        vocab_size=400, max_positions=64, defaults=DEFAULTS, tokenizer=tokenizer, model="a model"
    )


def test_unset_parameters_are_those_of_the_model() -> None:
    (request,) = intake().requests([1, 2, 3], SamplingParams(max_tokens=5, top_p=0.5), 12.5)

    assert request.params.temperature == 0.6
    assert request.params.top_p == 0.5
    assert request.params.top_k == 20
    assert request.params.repetition_penalty == 1.0
    assert request.end_token_ids == (7, 9)
    assert request.arrival_s == 12.5
    assert request.max_tokens == 8


def test_the_parameters_of_the_client_are_not_touched() -> None:
    params = SamplingParams()

    intake().requests([1], params, 0.0)

    assert params == SamplingParams()


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.uint16)])
def test_ids_of_any_integer_kind_become_int64(kind: type) -> None:
    (request,) = intake().requests(kind([5, 399, 0]), SamplingParams(), 0.0)

    assert request.prompt_ids.dtype == np.int64
    assert request.prompt_ids.tolist() == [5, 399, 0]


def test_text_is_encoded_with_the_tokens_that_the_model_expects() -> None:
    tokenizer = Tokenizer(byte_level_bpe())

    (request,) = intake(tokenizer).requests("the cat", SamplingParams(), 0.0)

    assert request.prompt_ids.tolist() == tokenizer.encode("the cat").tolist()
    assert request.prompt_ids[0] == 0  # the begin token


def test_no_text_is_no_prompt_though_a_begin_token_could_be_added() -> None:
    with pytest.raises(ValueError, match="prompt must hold at least one token, got none"):
        intake(Tokenizer(byte_level_bpe())).requests("", SamplingParams(), 0.0)


def test_ids_that_the_tokenizer_does_not_know_are_fine_if_the_model_does() -> None:
    (request,) = intake(Tokenizer(words())).requests([399], SamplingParams(), 0.0)

    assert request.prompt_ids.tolist() == [399]


def test_request_ids_count_up_and_refused_prompts_take_none() -> None:
    door = intake()
    found = []
    for prompt in ([1], [], [2], [400], [3]):
        try:
            found += door.requests(prompt, SamplingParams(n=2), 0.0)
        except ValueError:
            continue

    assert [request.request_id for request in found] == [0, 1, 2, 3, 4, 5]


def test_samples_share_the_prompt_and_the_first_has_the_seed() -> None:
    requests = intake().requests([1, 2], SamplingParams(n=50, seed=11), 0.0)

    assert requests[0].seed == 11
    assert len({request.seed for request in requests}) == 50
    assert all(0 <= request.seed < NUM_SEEDS for request in requests)
    assert all(request.prompt_ids is requests[0].prompt_ids for request in requests)
    again = intake().requests([1, 2], SamplingParams(n=3, seed=11), 0.0)
    assert [request.seed for request in again] == [request.seed for request in requests[:3]]


def test_unset_seeds_are_drawn() -> None:
    door = intake()

    seeds = {door.requests([1], SamplingParams(), 0.0)[0].seed for _ in range(20)}

    assert len(seeds) == 20


def test_prompt_and_output_may_fill_the_model_but_no_more() -> None:
    door = intake()

    (request,) = door.requests([1] * 60, SamplingParams(max_tokens=4), 0.0)

    assert request.max_tokens == 64
    with pytest.raises(ValueError, match=r"64 positions, got 60 \+ 5 = 65; shorten one of them"):
        door.requests([1] * 60, SamplingParams(max_tokens=5), 0.0)
