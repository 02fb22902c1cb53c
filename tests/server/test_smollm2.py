"""A model that speaks, through HTTP: what transformers says, and what the offline API says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mnemosyne.llm import LLM
from tools.live_server import serving

QUESTION: list[Any] = [
    {"role": "system", "content": "You answer in a few words."},
    {"role": "user", "content": "What is the capital of France? Écris-le aussi en français 🙂"},
]
PROMPT = "The tallest mountain on Earth is"
NUM_TOKENS = 12


def of_transformers(path: Path) -> list[str]:
    """A chat answer and a completion by the oracle, greedy, in float64."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    chat = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    texts = []
    for prompt in (chat, PROMPT):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def test_chat_and_completion_are_those_of_transformers(smollm2: Path) -> None:
    expected = of_transformers(smollm2)
    cache = {"max_tokens": 1024, "page_size": 64}
    greedy: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": NUM_TOKENS}

    with (
        LLM(
            str(smollm2), dtype="float64", device="cpu", schedule={"chunk": 64}, cache=cache
        ) as llm,
        serving(llm.engine, model_names=["any"]) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="x", max_retries=0) as client,
    ):
        chat = client.chat.completions.create(messages=QUESTION, **greedy)
        chunks = client.chat.completions.create(messages=QUESTION, stream=True, **greedy)
        streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        completion = client.completions.create(prompt=PROMPT, **greedy)

    assert [chat.choices[0].message.content, completion.choices[0].text] == expected
    assert streamed == expected[0]
