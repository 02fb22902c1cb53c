"""A model that speaks, through HTTP: it says what transformers says, and as likely."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemosyne.llm import LLM
from tools.live_server import serving

QUESTION: list[Any] = [
    {"role": "system", "content": "You answer in a few words."},
    {"role": "user", "content": "What is the capital of France? Écris-le aussi en français 🙂"},
]
PROMPT = "The tallest mountain on Earth is"
CONTINUATION = " Mount Everest, which is 8,849 metres high."
NUM_TOKENS = 12


class Oracle:
    """transformers in float64, greedy."""

    def __init__(self, path: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)

    def ids(self, text: str) -> torch.Tensor:
        ids: torch.Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    def say(self, text: str) -> str:
        ids = self.ids(text)
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        said: str = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return said

    def logprobs(self, ids: torch.Tensor) -> tuple[list[float], list[float]]:
        """Of each token but the first, and of the most likely one there."""
        with torch.no_grad():
            found = self.model(ids).logits[0, :-1].log_softmax(-1)
        own = found.gather(1, ids[0, 1:, None])[:, 0]
        return own.tolist(), found.max(-1).values.tolist()


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Oracle:
    return Oracle(smollm2)


@pytest.fixture(scope="module")
def speaker(smollm2: Path) -> Iterator[openai.OpenAI]:
    cache = {"max_tokens": 1024, "page_size": 64}
    with (
        LLM(
            str(smollm2), dtype="float64", device="cpu", schedule={"chunk": 64}, cache=cache
        ) as llm,
        serving(llm.engine, model_names=["any"]) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client,
    ):
        yield client


def test_chat_and_completion_are_those_of_transformers(
    speaker: openai.OpenAI, oracle: Oracle
) -> None:
    greedy: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": NUM_TOKENS}
    chat = oracle.tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, tokenize=False
    )
    expected = oracle.say(chat)

    whole = speaker.chat.completions.create(messages=QUESTION, **greedy)
    chunks = speaker.chat.completions.create(messages=QUESTION, stream=True, **greedy)
    completion = speaker.completions.create(prompt=PROMPT, **greedy)

    assert whole.choices[0].message.content == expected
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert completion.choices[0].text == oracle.say(PROMPT)


def test_a_continuation_is_as_likely_as_transformers_finds_it(
    speaker: openai.OpenAI, oracle: Oracle
) -> None:
    """As lm-eval asks and reads: the last token is a new one, which it leaves out."""
    ids = oracle.ids(PROMPT + CONTINUATION)
    own, best = oracle.logprobs(ids)
    length = oracle.ids(PROMPT).shape[1]

    asked: dict[str, Any] = {"model": "any", "max_tokens": 1, "temperature": 0, "seed": 1234}
    completion = speaker.completions.create(
        prompt=[ids[0].tolist()], echo=True, logprobs=1, **asked
    )

    told = completion.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert told.top_logprobs is not None
    tops = [max(top.values()) for top in told.top_logprobs[length:-1]]
    assert told.token_logprobs[length:-1] == pytest.approx(own[length - 1 :], abs=1e-5)
    assert tops == pytest.approx(best[length - 1 :], abs=1e-5)


TEXTS = (
    PROMPT,
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three states of matter are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 2, 4, 8, 16,",
)


@pytest.mark.slow
def test_in_float32_it_parts_from_transformers_only_where_two_tokens_are_as_likely(
    smollm2: Path, oracle: Oracle
) -> None:
    asked = {"temperature": 0, "max_tokens": 64, "ignore_eos": True, "return_token_ids": True}
    with (
        LLM(str(smollm2), dtype="float32", device="cpu", schedule={"chunk": 64}) as llm,
        serving(llm.engine) as live,
    ):
        answers = [
            httpx.post(
                f"{live.url}/v1/completions", json={"prompt": text, **asked}, timeout=120
            ).json()["choices"][0]
            for text in TEXTS
        ]

    for answer in answers:
        ids = torch.tensor([answer["prompt_token_ids"] + answer["token_ids"]])
        said = ids[0, len(answer["prompt_token_ids"]) :]
        assert len(said) == 64
        with torch.no_grad():
            logits_TV = oracle.model(ids).logits[0, -65:-1]
        others = (logits_TV.argmax(-1) != said).nonzero()[:1, 0]
        best = logits_TV[others].topk(2).values
        assert (best[:, 0] - best[:, 1] < 1e-4).all()
