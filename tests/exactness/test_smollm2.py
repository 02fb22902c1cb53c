"""A trained model on natural text and chat: every token, text and probability is transformers'.

Trained weights have outliers and near ties, which random ones lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mnemosyne.llm import LLM
from mnemosyne.request import RequestOutput
from tests.engines import greedy

QUESTIONS = (
    "What is the capital of France?",
    "Name three planets.",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue? Answer briefly.",
    "List two uses of a hammer.",
    "Wie heißt die Hauptstadt von Österreich? 🇦🇹",
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog. The dog, being lazy,",
    "Once upon a time there was a lighthouse keeper who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969 two people walked on the Moon. In 1972",
    "Ingredients: 200 g flour, 3 eggs, a pinch of salt.\n\n1. Mix the flour",
    "Dear Sir or Madam,\n\nI am writing to ask about",
    "The naïve café owner said: “Crème brûlée costs €5.”",
    "| city | country |\n|---|---|\n| Paris | France |\n| Rome |",
)
NUM_TOKENS = 12  # of each answer


@dataclass(frozen=True)
class Expected:
    """Answer of transformers to a prompt, in float64."""

    prompt_ids: np.ndarray
    token_ids: list[int]  # up to the end token, with it
    text: str


@cache
def oracle(path: Path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@cache
def expected(path: Path, num_each: int, num_tokens: int) -> list[Expected]:
    """Answers to the first questions and texts, chat and text in turns."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in QUESTIONS[:num_each]
    ]
    prompts = [text for pair in zip(rendered, TEXTS, strict=False) for text in pair]
    answers = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        made = oracle(path, torch.float64).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
        )[0, ids.shape[1] :]
        text = tokenizer.decode(made, skip_special_tokens=True)
        answers.append(Expected(ids[0].numpy(), made.tolist(), text))
    return answers


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of transformers, with the angles of rotary pairs as exact as ours.

    Its own are float32: at position 2,000 they are off by 1e-4 rad, which moves a log-probability
    by up to 3.5e-4, in float64 as well.
    """
    half = torch.arange(0, model.config.head_dim, 2, dtype=torch.float64)
    radians = model.config.rope_parameters["rope_theta"] ** (-half / model.config.head_dim)

    def rotary(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * radians
        both = torch.cat((angles, angles), dim=-1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(model.model.rotary_emb, "forward", rotary)
        return model(ids_BT).logits[0]


def check(outputs: Sequence[RequestOutput], answers: Sequence[Expected]) -> None:
    assert [output.token_ids for output in outputs] == [answer.token_ids for answer in answers]
    assert [output.text for output in outputs] == [answer.text for answer in answers]


def open_smollm2(path: Path, chunk: int | str, dtype: str = "float64") -> LLM:
    return LLM(
        str(path), dtype=dtype, device="cpu", schedule={"chunk": chunk}, cache={"max_tokens": "4K"}
    )


def test_tokens_and_texts_are_those_of_transformers(smollm2: Path) -> None:
    answers = expected(smollm2, 2, 6)

    with open_smollm2(smollm2, 17) as llm:
        outputs = llm.generate([answer.prompt_ids for answer in answers], greedy(6))

    check(outputs, answers)


@pytest.mark.slow
def test_each_of_16_prompts_alone_is_answered_as_by_transformers(smollm2: Path) -> None:
    answers = expected(smollm2, 8, NUM_TOKENS)

    with open_smollm2(smollm2, 17) as llm:
        outputs = [llm.generate([a.prompt_ids], greedy(NUM_TOKENS))[0] for a in answers]

    check(outputs, answers)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [1, 17, "adaptive"])
def test_16_prompts_together_are_answered_as_by_transformers(
    smollm2: Path, chunk: int | str
) -> None:
    answers = expected(smollm2, 8, NUM_TOKENS)

    with open_smollm2(smollm2, chunk) as llm:
        outputs = llm.generate([a.prompt_ids for a in answers], greedy(NUM_TOKENS))

    check(outputs, answers)


@pytest.mark.parametrize(
    "num_tokens", [200, pytest.param(2000, marks=pytest.mark.slow)], ids="{} tokens".format
)
def test_log_probabilities_of_prose_are_those_of_transformers(
    smollm2: Path, num_tokens: int
) -> None:
    prose = (Path(__file__).parents[2] / "docs" / "performance" / "log.md").read_text(
        encoding="utf-8"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(prose[: 10 * num_tokens], return_tensors="pt")["input_ids"][:, :num_tokens]
    logits_SV = logits(oracle(smollm2, torch.float32), ids)
    exact = torch.log_softmax(logits_SV.double(), dim=-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]

    with open_smollm2(smollm2, 128, "float32") as llm:
        (output,) = llm.generate([ids[0].numpy()], greedy(1, prompt_logprobs=0))

    assert output.prompt_logprobs is not None
    ours = torch.tensor([entry.logprob for entry in output.prompt_logprobs[1:] if entry])
    assert len(ours) == num_tokens - 1
    assert (ours - exact).abs().max() < 1e-4
