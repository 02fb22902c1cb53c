"""OpenAI's client against a server on a socket: every answer is the offline one."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from mnemosyne.llm import LLM
from mnemosyne.request import SamplingParams
from tests.server.conftest import NUM_TOKENS

PROMPT = "the door code is monday seven . what is the door code ?"
MESSAGES: list[Any] = [
    {"role": "system", "content": "tell the code"},
    {"role": "user", "content": [{"type": "text", "text": PROMPT}]},
    {"role": "developer", "content": "now"},
]
SAMPLED = {"temperature": 1.5, "seed": 3, "top_p": 0.9, "max_tokens": 12}


def test_a_completion_is_the_offline_one(client: openai.OpenAI, offline: LLM) -> None:
    expected = offline.generate(PROMPT, SamplingParams(**SAMPLED))[0]

    completion = client.completions.create(model="needle", prompt=PROMPT, **SAMPLED)

    Completion.model_validate(completion.model_dump(), strict=True)
    assert completion.choices[0].text == expected.text
    assert completion.choices[0].finish_reason == expected.finish_reason
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert completion.usage.completion_tokens == len(expected.token_ids)


def test_a_chat_is_the_offline_one_with_developers_as_system(
    client: openai.OpenAI, offline: LLM
) -> None:
    plain = [dict(message) for message in MESSAGES]
    plain[1]["content"], plain[2]["role"] = PROMPT, "system"
    expected = offline.chat(plain, SamplingParams(**SAMPLED))[0]

    chat = client.chat.completions.create(model="needle", messages=MESSAGES, **SAMPLED)

    ChatCompletion.model_validate(chat.model_dump(), strict=True)
    assert chat.choices[0].message.content == expected.text
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(expected.prompt_token_ids)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**SAMPLED, "n": 3, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(model="needle", messages=MESSAGES, **asked)

    chunks = list(
        client.chat.completions.create(
            model="needle",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
            **asked,
        )
    )

    texts, logprobs = ["", "", ""], [[], [], []]  # type: ignore[var-annotated]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.content or []
    assert texts == [choice.message.content for choice in whole.choices]
    assert logprobs == [c.logprobs.content for c in whole.choices if c.logprobs is not None]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_prompts_are_answered_in_order_each_n_times(client: openai.OpenAI, offline: LLM) -> None:
    params = SamplingParams(**SAMPLED, n=2)
    prompts = [offline.generate(text)[0].prompt_token_ids.tolist() for text in ("the", PROMPT)]
    expected = [sample for output in offline.generate(prompts, params) for sample in output.samples]

    completion = client.completions.create(model="needle", prompt=prompts, n=2, **SAMPLED)

    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in completion.choices] == [e.text for e in expected]


def test_an_echo_has_the_log_probability_of_every_token(http: httpx.Client, offline: LLM) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, prompt_logprobs=1)
    expected = offline.generate(PROMPT, params)[0]
    body = {"prompt": expected.prompt_token_ids.tolist(), "echo": True, "logprobs": 1}

    answer = http.post("/v1/completions", json={**body, "max_tokens": 1, "temperature": 0}).json()

    told = answer["choices"][0]["logprobs"]
    entries = [*(expected.prompt_logprobs or []), *(expected.logprobs or [])]
    assert told["token_logprobs"] == [entry and entry.logprob for entry in entries]
    assert told["top_logprobs"][0] is None
    for token, logprob, top in zip(*(told[k][1:] for k in told if k != "text_offset"), strict=True):
        assert top[token] == logprob
        assert max(top.values()) >= logprob


def test_an_echo_without_new_tokens_is_the_prompt(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="needle", prompt=PROMPT, echo=True, max_tokens=0, logprobs=0
    )

    assert completion.choices[0].text == PROMPT
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 0
    assert completion.choices[0].logprobs is not None
    tokens = completion.choices[0].logprobs.tokens
    assert tokens is not None
    assert len(tokens) == completion.usage.prompt_tokens


def test_ids_come_back_where_they_are_asked_for(http: httpx.Client, offline: LLM) -> None:
    expected = offline.generate(PROMPT, SamplingParams(**SAMPLED))[0]
    body = {"prompt": PROMPT, "return_token_ids": True, **SAMPLED}

    choice = http.post("/v1/completions", json=body).json()["choices"][0]

    assert choice["token_ids"] == expected.token_ids
    assert choice["prompt_token_ids"] == expected.prompt_token_ids.tolist()


def test_texts_and_ids_turn_into_one_another(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"prompt": "monday tuesday"}).json()["tokens"]

    text = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]

    assert "monday tuesday" in text


def test_models_say_what_fits(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data

    assert model.id == "needle"
    assert model.model_extra is not None
    assert model.model_extra["max_request_tokens"] == NUM_TOKENS
    assert client.models.retrieve("needle").id == "needle"


def test_an_unknown_model_is_told_which_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model must be one of needle, got 'gpt-9'"):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.NotFoundError, match="must be one of needle"):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("temperature", -1, "temperature must be a finite number >= 0, got -1"),
        ("n", 999, "n must lie in [1, 128], got 999"),
        ("max_tokens", "many", "max_tokens must be a whole number in [0, "),
        ("max_tokens", 5000, "fit the cache of 4096 tokens, got 14 + 5000 = 5014"),
        ("stop", [7], "stop must hold non-empty strings, got 7"),
        ("logit_bias", {"x": 1}, "logit_bias must map token ids to biases, got 'x'"),
        ("best_of", 3, "best_of must be left out, got 3; ask for n samples instead"),
        ("response_format", {"type": "json_object"}, "response_format.type must be text"),
        ("prompt", [], "prompt must hold 1 to 256 prompts, got 0"),
        ("n", 128, "n must ask for at most 256 samples in all, got 128 of 3 prompts"),
        ("prompt", [1, 1.5], "prompt must be text or a flat list of token ids"),
        ("prompt", [1, 10**6], "prompt ids must lie in [0, "),
        ("prompt", "", "prompt must hold at least one token"),
        ("prompt", None, "prompt must be given, got none"),
        ("stream", "yes", "stream must be true or false, got 'yes'"),
    ],
)
def test_a_wrong_field_is_named_with_its_rule(
    http: httpx.Client, field: str, value: object, said: str
) -> None:
    prompt = [[5], [6], [7]] if value == 128 else PROMPT
    response = http.post("/v1/completions", json={"prompt": prompt, field: value})

    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert said in error["message"]
    assert error["message"].startswith(error["param"])
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hi", "messages[0] must be an object, got 'hi'"),
        ({"content": "hi"}, "messages[0].role must be a string, got None"),
        ({"role": "user"}, "messages[0].content must be text, got None"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "messages[0].content[0] must be a part of type text",
        ),
    ],
)
def test_a_wrong_message_is_named(http: httpx.Client, message: object, said: str) -> None:
    response = http.post("/v1/chat/completions", json={"messages": [message]})

    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"prompt": [1,', b'{"prompt": "\xff"}', b"\x00"])
def test_a_body_that_is_no_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/completions", content=body)

    assert response.status_code == 400
    assert "must be" in response.json()["error"]["message"]


def test_fields_that_nobody_knows_are_ignored(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "frobnicate": [1], "cache_salt": "x", "stop": None}

    assert http.post("/v1/completions", json=body).status_code == 200


def test_numbers_may_be_written_in_any_size_that_their_rules_allow(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1, "presence_penalty": 2**70, "deadline": 10**30}
    huge = {"logit_bias": {"5": -(2**80)}, "stop": ["x"]}

    response = http.post("/v1/completions", json={**body, **huge})

    assert response.status_code == 200, response.text


def test_a_request_id_comes_back(http: httpx.Client) -> None:
    headers = {"X-Request-Id": "mine-1"}

    response = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=headers)

    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    assert len(http.get("/health").headers["x-request-id"]) == 32
