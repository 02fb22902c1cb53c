"""The door: what becomes of a prompt and its parameters when they are accepted."""

from __future__ import annotations

import itertools
from array import array
from collections import UserDict, UserList, deque
from typing import Any

import numpy as np
import pytest
import torch

from mnemosyne.request import NUM_SEEDS, SamplingParams
from mnemosyne.serve.defaults import GenerationDefaults
from mnemosyne.serve.intake import Intake, refused_output
from mnemosyne.serve.prompts import list_prompts
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


def test_stop_strings_are_refused_where_there_is_no_text_to_find_them_in() -> None:
    with pytest.raises(ValueError, match="stop must be empty for a model, which"):
        intake().requests([1], SamplingParams(stop="x"), 0.0)

    (request,) = intake(Tokenizer(words())).requests([1], SamplingParams(stop="x"), 0.0)
    assert request.params.stop == ("x",)


class Hostile:
    """A prompt that raises whatever it is asked."""

    def __len__(self) -> int:
        raise KeyError("len")

    __iter__ = __array__ = __repr__ = __len__  # type: ignore[assignment]


class EndlessList(UserList[int]):
    """It has one item, it says."""

    def __iter__(self) -> Any:
        return itertools.repeat(5)


class LyingList(UserList[int]):
    def __iter__(self) -> Any:
        raise RuntimeError("not today")

    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    "kind",
    [
        *(list, tuple, deque, UserList, np.array, torch.tensor),
        lambda ids: array("q", ids),
        lambda ids: np.array(ids, np.uint16),
    ],
)
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


@pytest.mark.parametrize(
    "prompt",
    [
        [[], []],
        np.zeros((3, 0), dtype=np.int64),
        np.zeros((0, 3), dtype=np.int64),
        [[1, 2]],
        [1, [2]],
        [1.0, 2.0],
        np.array([1.0]),
        [True, 5],
        np.array([True]),
        UserList([5, np.True_]),
        b"ab",
        bytearray(b"ab"),
        None,
        5,
        np.array(5),
        object(),
        [None],
        ["1", "2"],
        [2**70],
        np.array([2**63], dtype=np.uint64),
        np.broadcast_to(np.int64(5), 10**12),
        range(10**12),
        range(10**30),
        Hostile(),
        LyingList([5, 6]),
        [EndlessList([5])],
        [[EndlessList([5])]],
        {"input_ids": [5], "attention_mask": [EndlessList([5])]},
        torch.tensor([5.0]),
        {"prompt": "a", "image": 3},
        {"ids": [5]},
        {"prompt_token_ids": None},
        {"input_ids": [[5, 6], [7, 8]]},
        {"input_ids": [5, 0], "attention_mask": [1, 0]},
        {"input_ids": [5, 0], "attention_mask": Hostile()},
        {},
    ],
)
def test_what_is_no_prompt_is_refused_by_name(prompt: Any) -> None:
    door = intake(Tokenizer(words()))

    with pytest.raises(ValueError, match=r"must .*, got .*; ") as refusal:
        door.requests(prompt, SamplingParams(max_tokens=1), 0.0)

    assert len(str(refusal.value)) < 400
    assert refused_output(prompt, str(refusal.value)).finish_reason == "error"
    assert door.requests([5], SamplingParams(), 0.0)[0].request_id == 0


@pytest.mark.parametrize(
    "prompt",
    [
        {"prompt": "hello"},
        {"prompt_token_ids": [3, 4]},
        {"prompt_token_ids": np.array([3, 4]), "prompt": "the text of it"},
        UserDict(input_ids=[3, 4], attention_mask=[1, 1]),
        UserDict(input_ids=torch.tensor([[3, 4]]), attention_mask=torch.tensor([[1, 1]])),
    ],
)
def test_a_mapping_holds_one_prompt(prompt: Any) -> None:
    tokenizer = Tokenizer(words())
    expected = tokenizer.encode("hello").tolist() if "prompt" in prompt else [3, 4]
    expected = [3, 4] if "prompt_token_ids" in prompt else expected

    (request,) = intake(tokenizer).requests(prompt, SamplingParams(), 0.0)

    assert request.prompt_ids.tolist() == expected
    assert list_prompts([prompt]) == [prompt]
    with pytest.raises(
        ValueError, match=r"prompts must be in a list, not a \w*[dD]ict, got .*; write"
    ):
        list_prompts(prompt)


@pytest.mark.parametrize(
    ("prompts", "number"),
    [
        (np.array(["a", "b"]), 2),
        (np.array([[1], [2, 3]], dtype=object), 2),
        (iter([5, 6, 7]), 1),
        (range(10**9), 1),
        (torch.tensor([5, 6]), 1),
        (torch.tensor([[5, 6], [5, 7]]), 2),
        ([[5], {"prompt": "a"}, "b"], 3),
        ((), 0),
    ],
)
def test_prompts_are_told_from_a_list_of_them(prompts: Any, number: int) -> None:
    assert len(list_prompts(prompts)) == number


@pytest.mark.parametrize("prompts", [Hostile(), itertools.count(), itertools.repeat("a")])
def test_what_cannot_be_listed_is_refused(prompts: Any) -> None:
    with pytest.raises(ValueError, match=r"prompts must be .*, got .*; "):
        list_prompts(prompts)


def test_ids_that_were_accepted_do_not_change_with_the_clients() -> None:
    ids = np.array([5, 6])
    (request,) = intake().requests(ids, SamplingParams(), 0.0)

    ids[0] = 399

    assert request.prompt_ids.tolist() == [5, 6]


def test_unset_max_tokens_mean_as_many_as_model_and_cache_hold() -> None:
    door = intake()

    (by_model,) = door.requests([1] * 60, SamplingParams(max_tokens=None), 0.0)
    (by_cache,) = door.requests([1] * 10, SamplingParams(max_tokens=None), 0.0, 32)

    assert by_model.params.max_tokens == 4
    assert by_cache.params.max_tokens == 22
    with pytest.raises(ValueError, match=r"64 positions, got 64 \+ 1 = 65"):
        door.requests([1] * 64, SamplingParams(max_tokens=None), 0.0)


def test_parameters_that_were_changed_after_their_check_are_checked_again() -> None:
    params = SamplingParams()
    params.top_k = "many"  # type: ignore[assignment]

    with pytest.raises(ValueError, match="top_k must be a whole number, got 'many'"):
        intake().requests([1], params, 0.0)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_that_would_fill_the_memory_are_refused(name: str) -> None:
    door = Intake(
        vocab_size=400, max_positions=2**20, defaults=DEFAULTS, tokenizer=None, model="a model"
    )
    params = SamplingParams(max_tokens=2**14, **{name: 1000})

    with pytest.raises(ValueError, match=rf"^{name} must ask for at most 4,194,304 tokens in all"):
        door.requests([1] * 2**14, params, 0.0)


def test_the_end_token_of_the_tokenizer_ends_a_request_too() -> None:
    tokenizer = Tokenizer(byte_level_bpe())
    tokenizer.end_id = 1

    (request,) = intake(tokenizer).requests([5], SamplingParams(), 0.0)

    assert request.end_token_ids == (7, 9, 1)


@pytest.mark.parametrize(("added", "begins"), [(True, 1), (False, 0)])
def test_a_prompt_may_say_that_its_special_tokens_are_in_it(added: bool, begins: int) -> None:
    tokenizer = Tokenizer(byte_level_bpe())
    prompt = {"prompt": "the cat", "add_special_tokens": added}

    (request,) = intake(tokenizer).requests(prompt, SamplingParams(), 0.0)

    assert request.prompt_ids.tolist().count(0) == begins
    assert tokenizer.decode(request.prompt_ids) == "the cat"


@pytest.mark.parametrize("value", [None, "no", 2, []])
def test_whether_special_tokens_are_added_is_true_or_false(value: object) -> None:
    prompt = {"prompt": "the cat", "add_special_tokens": value}

    with pytest.raises(ValueError, match="add_special_tokens must be"):
        intake(Tokenizer(byte_level_bpe())).requests(prompt, SamplingParams(), 0.0)
