"""Conversations as prompts: one or several, each refused alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mnemosyne.llm import LLM
from mnemosyne.model_zoo.haystack import BEGIN, ID_OF, cycle, text_of
from mnemosyne.serve.chat import ChatTemplate
from mnemosyne.serve.prompts import Conversation, PromptReader, list_conversations
from mnemosyne.serve.tokenizer import Tokenizer
from tests.caches import empty_cache
from tests.engines import greedy
from tests.serve.made_tokenizers import byte_level_bpe

DAYS, PLANETS = cycle("days", 3), cycle("planets", 3)
TEMPLATE = (
    "{{ messages[0].content }}|{{ tools[0].name if tools }}|{{ mood }}"
    "{% if add_generation_prompt %}|go{% endif %}"
)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """The needle model, whose template writes a begin token and the messages."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = empty_cache(tmp_path_factory.mktemp("cache"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with LLM(
            "needle", dtype="float32", schedule={"chunk": 64}, cache={"max_tokens": "1K"}
        ) as opened:
            yield opened


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_conversation_is_answered(llm: LLM) -> None:
    (output,) = llm.chat(ask(text_of(DAYS.prompt_ids)), greedy(3))

    assert output.token_ids == DAYS.answer_ids.tolist()


def test_conversations_are_answered_in_order_and_refused_alone(llm: LLM) -> None:
    conversations: list[Any] = [
        ask(text_of(DAYS.prompt_ids)),
        [{"role": "user", "content": object()}],
        7,
        ask(text_of(PLANETS.prompt_ids)),
    ]

    first, foreign, none, last = llm.chat(conversations, [greedy(3)] * 4)

    assert first.token_ids == DAYS.answer_ids.tolist()
    assert last.token_ids == PLANETS.answer_ids.tolist()
    assert [foreign.finish_reason, none.finish_reason] == ["error", "error"]
    assert "messages must be plain JSON data" in (foreign.error or "")


def test_a_conversation_has_one_begin_token_and_so_has_its_text(llm: LLM) -> None:
    assert llm.tokenizer is not None
    messages = ask("amber falcon")
    rendered = llm.tokenizer.apply_chat_template(messages)

    chat, text = llm.chat(messages, greedy(1)), llm.generate(rendered, greedy(1))

    assert chat[0].prompt_token_ids.tolist() == text[0].prompt_token_ids.tolist()
    assert chat[0].prompt_token_ids.tolist().count(ID_OF[BEGIN]) == 1


def test_the_template_gets_tools_variables_and_whether_an_answer_follows() -> None:
    tokenizer = Tokenizer(byte_level_bpe(), ChatTemplate({"default": TEMPLATE}, {}))
    reader = PromptReader(vocab_size=400, max_positions=99, tokenizer=tokenizer, model="m")
    options = {"tools": [{"name": "weather"}], "variables": {"mood": "calm"}}

    texts = [
        tokenizer.decode(reader.read(Conversation(messages=ask("hi"), **fields)).ids)
        for fields in ({}, {"add_generation_prompt": False, **options})
    ]

    assert texts == ["hi|||go", "hi|weather|calm"]


@pytest.mark.parametrize("messages", [[], "hello", None, 3])
def test_what_is_no_conversation_is_refused_by_name(messages: object) -> None:
    with pytest.raises(ValueError, match=r"^messages must"):
        list_conversations(messages)


def test_a_model_without_a_tokenizer_takes_no_conversation() -> None:
    reader = PromptReader(vocab_size=400, max_positions=99, tokenizer=None, model="bench")

    with pytest.raises(
        ValueError, match=r"^messages must go to a model with a tokenizer, got bench"
    ):
        reader.read(Conversation(messages=ask("hi")))
