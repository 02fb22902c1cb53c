"""The text of an answer: what of its tokens is shown, and what ends it."""

from __future__ import annotations

import pytest

from tests.serve.made_tokenizers import END, byte_level_bpe
from tests.serve.scripted import say


@pytest.mark.parametrize(("skip", "text"), [(True, "the mat"), (False, f"the{END} mat")])
def test_special_tokens_are_text_if_asked_for(skip: bool, text: str) -> None:
    backend = byte_level_bpe()
    ids = backend.encode(f"the{END} mat", add_special_tokens=False).ids

    output = say(backend, "a cat and", ids, skip_special_tokens=skip)

    assert output.text == text
