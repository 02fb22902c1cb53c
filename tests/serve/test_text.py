"""The text of an answer: what of its tokens is shown, and what ends it."""

from __future__ import annotations

import pytest
import tokenizers

from tests.serve.made_tokenizers import END, byte_fallback_bpe, byte_level_bpe, metaspace_bpe
from tests.serve.scripted import say


@pytest.mark.parametrize(("skip", "text"), [(True, "the mat"), (False, f"the{END} mat")])
def test_special_tokens_are_text_if_asked_for(skip: bool, text: str) -> None:
    backend = byte_level_bpe()
    ids = backend.encode(f"the{END} mat", add_special_tokens=False).ids

    output = say(backend, "a cat and", ids, skip_special_tokens=skip)

    assert output.text == text


@pytest.mark.parametrize("backend", [byte_fallback_bpe(), metaspace_bpe()], ids=["llama", "new"])
def test_an_answer_begins_with_the_space_between_it_and_its_prompt(
    backend: tokenizers.Tokenizer,
) -> None:
    ids = [backend.token_to_id(token) for token in ("▁b", "c")]

    output = say(backend, "a", ids)

    assert output.text == " bc"


def test_a_special_token_as_stop_string_ends_a_request_by_its_name() -> None:
    backend = byte_level_bpe()
    ids = backend.encode(f"the cat{END} sat", add_special_tokens=False).ids

    output = say(backend, "x", ids, stop=[END])

    assert (output.text, output.finish_reason, output.stop_reason) == ("the cat", "stop", END)
